// All kernels, for the tier that LLM2_FAST_TIER names. Included once by each kernels_<tier>.cpp, after simd_<tier>.h,
// and compiled there with the tier's flags. Everything lives in the tier's namespace or is static: a function compiled
// for AVX-512 must not share a symbol with portable code. For the same reason std:: templates stay out.
#pragma once

#include "adjust_and_pick.h"
#include "branch_attention.h"
#include "kernels.h"
#include "layer_ops.h"
#include "linear.h"
#include "select_candidates.h"
#include "select_fold.h"

namespace llm2_fast {
namespace LLM2_FAST_TIER {

const KernelTable kKernels = {
    select_candidates,
    adjust_and_pick,
    branch_attention,
    attend_part,
    merge_parts,
    attention_state_size,
    adjust_and_pick_workspace,
    branch_attention_workspace,
    panel_shape,
    pack_panels,
    unpack_row,
    linear,
    linear_workspace,
    operands,
    operands_size,
    finish_selection,
    rms_norm,
    rope,
    dot,
};

}  // namespace LLM2_FAST_TIER
}  // namespace llm2_fast
