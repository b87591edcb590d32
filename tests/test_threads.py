"""Threads of the compiled decoders: as many as asked for, kept, idle between calls; Python and Ctrl-C do not wait."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils.dlpack import to_dlpack

import llm2_fast
import tiny
from llm2_fast import ops
from llm2_fast.backends import cached_decoder
from llm2_fast.models.weights import PackedWeights
from llm2_fast.verifier import FullVerifier
from verifiers import head_verifier

extension = ops.cpu_extension()
TASKS = Path("/proc/self/task")
pytestmark = pytest.mark.skipif(extension is None, reason=str(ops.cpu_extension_problem()))
needs_tasks = pytest.mark.skipif(not TASKS.exists(), reason="needs Linux's /proc")

PROMPT = [5, 6, 7, 8]
ENDLESS = 1 << 20  # tokens; they would take minutes


@pytest.fixture
def three_threads(monkeypatch):
    """Three threads share even tiny layers."""
    monkeypatch.setattr(cached_decoder, "MIN_SHARED_WEIGHTS", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@cache
def engine():
    return llm2_fast.load(tiny.causal_lm("llama", max_position_embeddings=2 * ENDLESS), backend="cpu")


def generate(max_new_tokens=20):
    return engine().generate(PROMPT, max_new_tokens=max_new_tokens, ignore_eos=True)[0].samples


def packed_linear(size):
    return extension.PackedLinear([to_dlpack(torch.ones(size, size))], [None], False, 1)


# Says how many threads torch would use and how many there are of the decoder's.
GENERATE_ENDLESSLY = f"""
import os
import signal
import torch
import llm2_fast
import tiny
from llm2_fast.backends import cached_decoder

signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent had
cached_decoder.MIN_SHARED_WEIGHTS = 0
model = tiny.causal_lm("llama", max_position_embeddings={2 * ENDLESS})
before = len(os.listdir("/proc/self/task"))
engine = llm2_fast.load(model, backend="cpu")
engine.generate({PROMPT}, max_new_tokens=5)
print(torch.get_num_threads(), 1 + len(os.listdir("/proc/self/task")) - before, flush=True)
engine.generate({PROMPT}, max_new_tokens={ENDLESS}, ignore_eos=True)
"""


@pytest.fixture(scope="module")
def program():
    """A program that has begun to generate with OMP_NUM_THREADS=2, and what it printed before."""
    path = os.pathsep.join([str(Path(llm2_fast.__file__).parents[1]), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", GENERATE_ENDLESSLY], env=environment, **pipes) as running:
        running.printed = running.stdout.readline()
        yield running
        running.kill()


# --- As many as asked for ------------------------------------------------------------------------------------------


def switches():
    """How often each of the other threads of this process was switched out."""
    others = [task for task in TASKS.iterdir() if task.name != str(os.getpid())]
    status = {task.name: (task / "status").read_text() for task in others}
    return {name: [line for line in text.splitlines() if "ctxt_switches" in line] for name, text in status.items()}


def switches_once_asleep():
    before, last = switches(), None
    while before != last:
        time.sleep(0.1)
        before, last = switches(), before
    return before


def added_and_woken(calls):
    """How many threads each call adds to this process, and how many of all that were added it wakes."""
    added, counts = set(), {}
    for name, call in calls:
        before = switches_once_asleep()
        call()
        after = switches_once_asleep()
        added |= after.keys() - before.keys()
        counts[name] = len(after.keys() - before.keys()), sum(before.get(task) != after[task] for task in added)
    return counts


def packing_and_passes():
    decoders = []

    def pack():
        weights = PackedWeights.pack(extension, engine().model.model)
        decoders.append(cached_decoder.CachedDecoder(extension, weights.decoder(), weights.spec, num_blocks=9))

    def extend():
        decoders[0].extend([decoders[0].allocate()], [PROMPT])

    torch.set_num_threads(3)
    yield "pack", pack
    yield "small layers", extend
    cached_decoder.MIN_SHARED_WEIGHTS = 0
    for num_threads in (3, 5, 2, 4, 1):
        torch.set_num_threads(num_threads)
        yield f"pass of {num_threads}", extend


def count_threads():
    return added_and_woken(packing_and_passes())


@needs_tasks
def test_as_many_threads_as_torch_says_and_only_those_wake():
    engine()  # models are made here: torch's own threads do not survive the fork either
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as fork:
        counts = fork.submit(count_threads).result(timeout=100)
    assert counts == {
        "pack": (2, 2),
        "small layers": (0, 0),
        "pass of 3": (0, 2),
        "pass of 5": (2, 4),
        "pass of 2": (0, 1),
        "pass of 4": (0, 3),
        "pass of 1": (0, 0),
    }


@needs_tasks
def test_as_many_threads_as_the_environment_says(program):
    expected = min(2, os.cpu_count())  # torch, too, does not start more than there are cores
    assert program.printed == f"{expected} {expected}\n"


@needs_tasks
def test_threads_are_kept_while_their_number_alternates():
    packed, inputs, output = packed_linear(64), torch.ones(2, 64), torch.empty(2, 64)

    def tasks_after(num_threads):
        packed.multiply(to_dlpack(inputs), to_dlpack(output), num_threads)
        return {task.name for task in TASKS.iterdir()}

    before = tasks_after(3)
    assert all(tasks_after(num_threads) == before for num_threads in (2, 3) * 10)


# --- Idle ----------------------------------------------------------------------------------------------------------


def test_idle_threads_take_no_processor_time(three_threads):
    generate()
    start = time.process_time()
    time.sleep(1)
    assert time.process_time() - start < 0.3  # two that spin would take up to two


# --- The interpreter lock ------------------------------------------------------------------------------------------


@pytest.fixture
def ticks():
    """Reads a clock that ticks only while whoever has the interpreter lets go of it: nobody is asked to."""
    count, done, interval = itertools.count(), threading.Event(), sys.getswitchinterval()
    last = [0]

    def tick():
        while not done.is_set():
            last[0] = next(count)
            time.sleep(1e-4)

    thread = threading.Thread(target=tick)
    sys.setswitchinterval(1000)
    thread.start()
    yield lambda: last[0]
    done.set()
    sys.setswitchinterval(interval)
    thread.join()


def ticks_during(ticks, call):
    before = ticks()
    call()
    return ticks() - before


def pack(weight):
    capsule = [to_dlpack(weight)]
    return lambda: extension.PackedLinear(capsule, [None], False, 1)


def multiply(inputs):
    packed, output = packed_linear(inputs.shape[1]), torch.empty_like(inputs)
    capsules = to_dlpack(inputs), to_dlpack(output)
    return lambda: packed.multiply(*capsules, 1)


LONG_CALLS = {  # some tenths of a second each
    "pack": lambda: pack(torch.ones(6000, 6000)),
    "multiply": lambda: multiply(torch.ones(4000, 1500)),
}


@pytest.mark.parametrize("name", LONG_CALLS)
def test_python_goes_on_during_a_call(name, ticks):
    call = LONG_CALLS[name]()
    assert ticks_during(ticks, lambda: sum(range(3_000_000))) == 0  # unlike during calls that keep the interpreter
    assert ticks_during(ticks, call) > 300  # of some 2,000; a few dozen where the interpreter is kept


class Watched:
    """A compiled decoder that sums up the ticks during its methods."""

    def __init__(self, decoder, ticks, sums):
        self._decoder, self._ticks, self._sums = decoder, ticks, sums

    def __getattr__(self, name):
        method = getattr(self._decoder, name)

        def watched(*args):
            before = self._ticks()
            result = method(*args)
            self._sums[name] = self._sums.get(name, 0) + self._ticks() - before
            return result

        return watched


@pytest.mark.parametrize(
    ("kind", "methods"), [(None, ["forward", "plain_step"]), ("head", ["joint_step"]), ("full", ["propose", "forward"])]
)
def test_python_goes_on_during_passes_and_steps(kind, methods, ticks):
    shape = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 8000}
    model = tiny.causal_lm("llama", **shape)
    verifier = head_verifier(model) if kind == "head" else None
    if kind == "full":
        classifier = tiny.classifier("llama", **shape)
        verifier = FullVerifier(classifier.base_model, classifier.score.weight.data)
    watching = llm2_fast.load(model, verifier, backend="cpu")
    sums = {}
    decoders = [watching._backend._llm, getattr(watching._backend._plan, "_verifier", None)]
    for decoder in filter(None, decoders):
        decoder.decoder = Watched(decoder.decoder, ticks, sums)
    for _ in range(20):  # steps are short: a busy machine may not wake the clock during any
        watching.generate([PROMPT * 8] * 8, max_new_tokens=20, ignore_eos=True, alpha=0.0, candidate_top_k=4)
        if all(sums[method] for method in methods):
            break
    assert all(sums[method] for method in methods)


# --- Ctrl-C --------------------------------------------------------------------------------------------------------


@needs_tasks
def test_ctrl_c_ends_a_program(program):
    time.sleep(0.5)
    assert program.poll() is None
    program.send_signal(signal.SIGINT)
    _, errors = program.communicate(timeout=30)
    assert program.returncode == -signal.SIGINT
    assert errors.splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens"), [(PROMPT, ENDLESS), (PROMPT * 15_000, 1)], ids=["decoding", "prefill"]
)
def test_an_interrupted_engine_goes_on(prompt, max_new_tokens, three_threads):
    expected = generate()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])

    def run():
        interrupt.start()
        engine().generate(prompt, max_new_tokens=max_new_tokens, ignore_eos=True)

    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        interrupt.cancel()
        signal.signal(signal.SIGINT, handler)
    assert generate() == expected
