"""`CudaDecoder`: a decoder on a GPU, the paged cache of its sequences, and passes over rows counted on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm2_fast.backends.cached_decoder import BLOCK_SIZE
from llm2_fast.backends.cuda_weights import CudaLinear, CudaWeights
from llm2_fast.backends.graph import StepGraph
from llm2_fast.cache.blocks import BlockTables
from llm2_fast.errors import ArgumentError, CacheFullError
from llm2_fast.kernels.branch_attention import Workspace, branch_attention, tile_rows
from llm2_fast.kernels.embed import embed
from llm2_fast.kernels.linear import WeightedRows, empty_partial, linear
from llm2_fast.kernels.project_heads import project_heads
from llm2_fast.kernels.rms_norm import rms_norm
from llm2_fast.kernels.rope_and_store import rope_and_store
from llm2_fast.kernels.row_tiles import plan_row_tiles
from llm2_fast.models.decoder import FINAL_LAYER

NUM_SLOTS = 1024  # what is kept per slot stays where it is, as captured graphs need it
_MAX_ROWS = 1024  # of one pass over prompts
_MAX_SEQUENCES = 64  # of one pass over prompts
_MIN_ROWS = 16


def row_budget(rows: int) -> int:
    """The size of the buffers for so many rows: few sizes, so few graphs."""
    return max(_MIN_ROWS, 1 << (rows - 1).bit_length())


class PassRows:
    """Static tensors of passes over up to R rows of up to S sequences.

    Attributes:
        token, slot, position: int32 [R].
        stored: bool [R], the row extends the prefix of its slot.
        count: int32 [1], the number of rows.
        hidden_states: [R, hidden_size] after the final norm, written.
        features: [R, layers * hidden_size], what a score head reads, written; `hidden_states` if that is all.
        own_key, own_value: [L, R, num_kv_heads, head_dim], written.
    """

    def __init__(self, weights: CudaWeights, rows: int, sequences: int, layers: tuple[int, ...]) -> None:
        spec, device, dtype = weights.spec, weights.device, weights.dtype

        def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        self.token, self.slot, self.position = (empty(rows, of=torch.int32) for _ in range(3))
        self.stored, self.adapted = empty(rows, of=torch.bool), empty(rows, of=torch.bool)
        self.has_own = torch.ones(rows, dtype=torch.bool, device=device)  # each sees its own key, stored or not
        self.count = empty(1, of=torch.int32)
        hidden, heads = spec.hidden_size, (rows, spec.num_heads, spec.head_dim)
        kv_heads = (spec.num_layers, rows, spec.num_kv_heads, spec.head_dim)
        self.stream, self.branch = empty(rows, hidden, of=torch.float32), empty(rows, hidden, of=torch.float32)
        self.weighted = WeightedRows.empty(rows, hidden, dtype, device)  # what the layers' products read
        self.hidden_states = empty(rows, hidden)
        self.qkv = empty(rows, (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim, of=torch.float32)
        self.query, self.attended = empty(*heads), empty(*heads)
        self.own_key, self.own_value = empty(*kv_heads), empty(*kv_heads)
        self.gated = empty(rows, spec.intermediate_size)
        angles = (len(spec.rotary_tables), rows, spec.head_dim // 2)
        self.cosine, self.sine = empty(*angles, of=torch.float32), empty(*angles, of=torch.float32)
        self.tile = tile_rows(spec.num_heads, spec.num_kv_heads, spec.head_dim, dtype)
        self.first_row = empty(min(rows, sequences + rows // self.tile) + 1, of=torch.int32)
        self.workspace = Workspace.empty(rows, spec.num_heads, spec.head_dim, device)
        self.features = self.hidden_states
        if layers != (FINAL_LAYER,):
            self.features = empty(rows, len(layers) * hidden, of=torch.float32)
        self.partials: dict[tuple[int, ...], torch.Tensor | None] = {}
        self.lora_hidden: dict[int, torch.Tensor] = {}
        for part in (part for layer in weights.layers for part in layer.linears.values()):
            for weight in (part.weight, part.lora_a):
                if weight is not None and tuple(weight.shape) not in self.partials:
                    self.partials[tuple(weight.shape)] = empty_partial(rows, weight)
            if part.lora_a is not None:
                self.lora_hidden.setdefault(len(part.lora_a), empty(rows, len(part.lora_a)))


class CudaDecoder:
    """Slots with committed prefixes, and passes over them.

    Args:
        weights: The decoder's.
        num_blocks: Blocks of `BLOCK_SIZE` positions in the cache.
        max_position_embeddings: Positions of a sequence at most.
        layers: Hidden states that a score head reads; `FINAL_LAYER` for the final norm's output.

    Attributes:
        lengths: Committed positions by slot.
        key_cache, value_cache: [L, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim].
        block_table: int32 [NUM_SLOTS, blocks of a sequence].
        device_lengths: int32 [NUM_SLOTS], of the slots that are being decoded.
        hidden_states: [NUM_SLOTS, hidden_size], final ones of each slot's last token.
    """

    def __init__(
        self,
        weights: CudaWeights,
        num_blocks: int,
        max_position_embeddings: int,
        layers: tuple[int, ...] = (FINAL_LAYER,),
    ) -> None:
        spec, self.device = weights.spec, weights.device
        self.weights, self.spec, self.layers = weights, spec, layers
        self.lengths: dict[int, int] = {}
        self._tables = BlockTables(BLOCK_SIZE, num_blocks)
        self._rows: dict[tuple[int, int], PassRows] = {}
        self._passes: dict[tuple[int, int], StepGraph] = {}
        cache = (spec.num_layers, num_blocks, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
        options = {"device": self.device, "dtype": weights.dtype}
        self.key_cache, self.value_cache = torch.empty(cache, **options), torch.empty(cache, **options)
        width = min(num_blocks, max_position_embeddings // BLOCK_SIZE + 2)
        self.block_table = torch.zeros(NUM_SLOTS, width, dtype=torch.int32, device=self.device)
        self.device_lengths = torch.zeros(NUM_SLOTS, dtype=torch.int32, device=self.device)
        self.slot_adapted = torch.zeros(NUM_SLOTS, dtype=torch.bool, device=self.device)
        self.hidden_states = torch.zeros(NUM_SLOTS, spec.hidden_size, **options)

    def allocate(self, *, adapted: bool = False) -> int:
        """An empty slot, whose rows get the low-rank updates if `adapted`.

        Raises:
            CacheFullError: All slots are in use.
        """
        if len(self.lengths) == NUM_SLOTS:
            raise CacheFullError(f"all {NUM_SLOTS} slots are in use")
        slot = self._tables.allocate()
        self.lengths[slot] = 0
        self.slot_adapted[slot].fill_(adapted)
        return slot

    def fork(self, slot: int, length: int | None = None) -> int:
        """A new slot with the committed prefix of `slot`, or the first `length` positions. Full blocks are shared.

        The hidden state that comes along is that of the whole prefix; a shorter one has to be extended before use.

        Raises:
            CacheFullError: There is no slot, or no block for the rest; nothing has changed.
        """
        if len(self.lengths) == NUM_SLOTS:
            raise CacheFullError(f"all {NUM_SLOTS} slots are in use")
        length = self.lengths[slot] if length is None else length
        child, copied = self._tables.fork(slot, length)
        self.lengths[child] = length
        self._write_table(child)
        if copied is not None:
            source, target = copied
            for cache in (self.key_cache, self.value_cache):
                cache[:, target].copy_(cache[:, source])
        self.hidden_states[child].copy_(self.hidden_states[slot])
        self.slot_adapted[child].copy_(self.slot_adapted[slot])
        return child

    def free(self, slot: int) -> None:
        """Give `slot` back."""
        self._tables.free(slot)
        del self.lengths[slot]

    def reserve(self, slot: int, length: int) -> None:
        """Make room for the positions [0, length) of `slot`.

        Raises:
            CacheFullError: Too few blocks are free; nothing has changed.
        """
        before = len(self._tables.table(slot))
        if self._tables.reserve(slot, length):
            self._write_table(slot, before)

    def extend(self, slots: Sequence[int], token_ids: Sequence[Sequence[int]]) -> None:
        """Run prompts, or what is missing of sequences, and keep the final hidden state of each one's last token.

        A row's result depends on its own positions only, so passes hold whatever rows come next.

        Raises:
            CacheFullError: Too few blocks are free; nothing has been computed.
        """
        for slot, tokens in zip(slots, token_ids, strict=True):
            self.reserve(slot, self.lengths[slot] + len(tokens))
        columns: tuple[list[int], ...] = ([], [], [])
        for slot, tokens in zip(slots, token_ids, strict=True):
            first = self.lengths[slot]
            if columns[0] and len(set(columns[1])) == _MAX_SEQUENCES:
                self._run(columns)
                columns = ([], [], [])
            for offset, token in enumerate(tokens):
                if len(columns[0]) == _MAX_ROWS:
                    self._run(columns)
                    columns = ([], [], [])
                for column, value in zip(columns, (token, slot, first + offset), strict=True):
                    column.append(value)
            self.lengths[slot] = first + len(tokens)
        if columns[0]:
            self._run(columns)

    def _run(self, columns: tuple[list[int], ...]) -> None:
        """A pass over rows that extend their slots."""
        tokens, slots, positions = columns
        rows = self.run_rows(tokens, slots, positions, [True] * len(tokens), _MAX_SEQUENCES)
        last = {slot: row for row, slot in enumerate(slots)}  # of a prompt in several passes, the last one's counts
        index = torch.tensor([list(last), list(last.values())], device=self.device)
        self.hidden_states.index_copy_(0, index[0], rows.hidden_states.index_select(0, index[1]))

    def run_rows(
        self, tokens: list[int], slots: list[int], positions: list[int], stored: list[bool], sequences: int
    ) -> PassRows:
        """A pass over rows that the host lists, of at most `sequences` slots; each slot's together."""
        rows = self.pass_rows(row_budget(len(tokens)), sequences)
        count = len(tokens)
        packed = torch.tensor([tokens, slots, positions, stored], dtype=torch.int32).to(self.device)
        for target, source in zip((rows.token, rows.slot, rows.position, rows.stored), packed, strict=True):
            target[:count].copy_(source)
        rows.count.fill_(count)
        key = (len(rows.token), sequences)
        if key not in self._passes:
            self._passes[key] = StepGraph(lambda: self.forward(rows), self.device)
        self._passes[key]()
        return rows

    def pass_rows(self, rows: int, sequences: int) -> PassRows:
        """The buffers for `rows` rows of `sequences` sequences; passes of the same size share them."""
        if (rows, sequences) not in self._rows:
            self._rows[rows, sequences] = PassRows(self.weights, rows, sequences, self.layers)
        return self._rows[rows, sequences]

    def forward(self, rows: PassRows) -> None:
        """One pass: launches only, over the rows and the tables as they are when it runs."""
        weights, spec, count = self.weights, self.spec, rows.count
        embed(
            rows.token, rows.position, weights.embedding, spec.embedding_scale, weights.inv_freq, weights.rotary_scale,
            rows.stream, rows.cosine, rows.sine, count,
        )  # fmt: skip
        plan_row_tiles(rows.slot, rows.tile, rows.first_row, count)
        if rows.lora_hidden:
            torch.index_select(self.slot_adapted, 0, rows.slot, out=rows.adapted)
        self._norm(rows, weights.layers[0].norms["input_norm"])
        squares = None  # of the weighted rows, unless they are normalized
        for index, layer in enumerate(weights.layers):
            self._attend(rows, index, squares)
            attended, norm = rows.attended.view(len(rows.token), -1), layer.norms["mlp_input_norm"]
            squares = self._add(rows, index, "o", attended, "attention_output_norm", norm)
            self._linear(
                rows, rows.weighted.values, layer.linears["gate_up"], rows.gated, squares=squares,
                activation=f"{spec.activation}_mul",
            )  # fmt: skip
            norm = weights.layers[index + 1].norms["input_norm"] if index + 1 < spec.num_layers else None
            squares = self._add(rows, index, "down", rows.gated, "mlp_output_norm", norm)
            self._keep_features(rows, index, rows.stream)
        rms_norm(rows.stream, weights.final_norm, spec.rms_norm_eps, None, rows.hidden_states, None, count)
        self._keep_features(rows, FINAL_LAYER, rows.hidden_states)

    def _norm(self, rows: PassRows, weight: torch.Tensor) -> None:
        """The norm of the residual stream, for the products that follow."""
        rms_norm(rows.stream, weight, self.spec.rms_norm_eps, None, rows.weighted.values, None, rows.count)

    def _attend(self, rows: PassRows, index: int, squares: torch.Tensor | None) -> None:
        """Attention of a layer to the prefixes, as the rows that are stored extend them, and of each row to itself."""
        spec, layer = self.spec, self.weights.layers[index]
        caches = self.key_cache[index], self.value_cache[index]
        own = rows.own_key[index], rows.own_value[index]
        where = self.block_table, rows.slot, rows.position
        angles = rows.cosine[layer.rotary_table], rows.sine[layer.rotary_table]
        heads = (*caches, *where, rows.stored, rows.query, *own)
        x, qkv, eps = rows.weighted.values, layer.linears["qkv"], spec.rms_norm_eps
        if "q_norm" in layer.norms or "k_norm" in layer.norms:
            norms = layer.norms.get("q_norm"), layer.norms.get("k_norm")
            self._linear(rows, x, qkv, rows.qkv, squares=squares)
            rope_and_store(rows.qkv, *angles, *norms, eps, *heads, rows.count)
        else:
            update, partial = self._update(rows, x, qkv, squares), rows.partials[tuple(qkv.weight.shape)]
            project_heads(x, qkv.weight, qkv.bias, *update, *angles, *heads, partial, rows.count, squares, eps)
        branch_attention(
            rows.query, *caches, *where, rows.has_own, *own, spec.attention_scale, layer.sliding_window, rows.attended,
            rows.first_row, rows.workspace,
        )  # fmt: skip

    def _add(
        self, rows: PassRows, index: int, name: str, x: torch.Tensor, output_norm: str, next_norm: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Add what a linear layer makes of `x`, normed if the layer has this norm, to the residual stream.

        Then apply the next norm, if there is one, but for the division by the squares that are returned, if they are.
        """
        layer, shard = self.weights.layers[index], self.weights.shard
        if output_norm not in layer.norms and shard.size == 1:
            self._linear(rows, x, layer.linears[name], rows.stream, residual=rows.stream, next_norm=next_norm)
            return None if next_norm is None else rows.weighted.squares
        self._linear(rows, x, layer.linears[name], rows.branch)
        shard.add(rows.branch)
        if output_norm in layer.norms:
            rms_norm(rows.branch, layer.norms[output_norm], self.spec.rms_norm_eps, None, rows.branch, None, rows.count)
        rows.stream.add_(rows.branch)
        if next_norm is not None:
            self._norm(rows, next_norm)
        return None

    def _linear(
        self,
        rows: PassRows,
        x: torch.Tensor,
        layer: CudaLinear,
        output: torch.Tensor,
        residual: torch.Tensor | None = None,
        activation: str | None = None,
        squares: torch.Tensor | None = None,
        next_norm: torch.Tensor | None = None,
    ) -> None:
        update, partial = self._update(rows, x, layer, squares), rows.partials[tuple(layer.weight.shape)]
        linear(
            x, layer.weight, layer.bias, *update, residual, activation, output, partial, rows.count, squares,
            self.spec.rms_norm_eps, next_norm, None if next_norm is None else rows.weighted,
        )  # fmt: skip

    def _update(
        self, rows: PassRows, x: torch.Tensor, layer: CudaLinear, squares: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """The low-rank update of a linear layer as launchers take it, A x computed."""
        if layer.lora_a is None:
            return None, None, None
        hidden, partial = rows.lora_hidden[len(layer.lora_a)], rows.partials[tuple(layer.lora_a.shape)]
        eps = self.spec.rms_norm_eps
        linear(x, layer.lora_a, None, None, None, None, None, None, hidden, partial, rows.count, squares, eps)
        return hidden, layer.lora_b, rows.adapted

    def _keep_features(self, rows: PassRows, layer: int, states: torch.Tensor) -> None:
        """Copy hidden states that a score head reads beside others."""
        if rows.features is not rows.hidden_states and layer in self.layers:
            size, place = self.spec.hidden_size, self.layers.index(layer)
            rows.features[:, place * size : (place + 1) * size].copy_(states)

    def prefix(self, slot: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Committed keys and values per layer, each [num_kv_heads, length, head_dim]."""
        blocks, length = list(self._tables.table(slot)), self.lengths[slot]

        def gather(storage: torch.Tensor) -> torch.Tensor:
            return storage[blocks].transpose(0, 1).flatten(1, 2)[:, :length]

        return [(gather(keys), gather(values)) for keys, values in zip(self.key_cache, self.value_cache, strict=True)]

    def last_hidden_state(self, token_ids: list[int]) -> torch.Tensor:
        """Final hidden state [hidden_size] of the last of some tokens."""
        slot = self.allocate()
        self.extend([slot], [token_ids])
        self.free(slot)
        return self.hidden_states[slot]

    def _write_table(self, slot: int, first: int = 0) -> None:
        """Copy the blocks of a slot from the `first` on to the device; one alone goes as an argument of a launch."""
        blocks = self._tables.table(slot)[first:]
        if first + len(blocks) > self.block_table.shape[1]:
            most = self.block_table.shape[1] * BLOCK_SIZE
            raise ArgumentError("sequence", f"at most {most} positions", (first + len(blocks)) * BLOCK_SIZE)
        target = self.block_table[slot, first : first + len(blocks)]
        if len(blocks) == 1:
            target.fill_(blocks[0])
        elif blocks:
            target.copy_(torch.tensor(blocks, dtype=torch.int32))
