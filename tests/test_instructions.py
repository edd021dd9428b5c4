"""The trials by which Inductor finds the processor's instructions: the same choice after fewer of them."""

import platform
import sys
import threading

import pytest
from torch._inductor import config, cpu_vec_isa

from vbdl.compiling import instructions


class Set:
    """A set of instructions with the flags it needs, which works or does not."""

    def __init__(self, flags: str, works: bool):
        self.flags, self.works, self.tried = flags, works, 0

    def __str__(self) -> str:
        return self.flags

    def __bool__(self) -> bool:
        self.tried += 1
        return self.works

    def bit_width(self) -> int:
        return 256 if self.flags == "avx2" else 512


@pytest.fixture
def sets(monkeypatch):
    """Four sets of a processor without AMX, of which the first that it has does not work."""
    each = [Set("amx", True), Set("avx512 vnni", False), Set("avx512", True), Set("avx2", True)]
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", each)
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: ["avx2", "avx512", "vnni"])
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", cpu_vec_isa.valid_vec_isa_list.__wrapped__)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(instructions, "_begin", lambda: None)  # counts of trials are those of this thread
    instructions._first.cache_clear()
    yield each
    instructions._first.cache_clear()


linux = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="only x86 has several sets"
)


@linux
def test_the_first_set_that_works_is_chosen_and_the_next_ones_are_not_tried(sets):
    with instructions.tried_once():
        chosen = [cpu_vec_isa.pick_vec_isa() for _ in range(2)]
    assert [s.tried for s in sets] == [0, 1, 1, 0]
    assert chosen == [cpu_vec_isa.pick_vec_isa()] * 2 == [sets[2]] * 2
    assert sets[3].tried == 1  # outside of the context Inductor tries all of them


@linux
def test_no_set_is_chosen_where_none_works(sets):
    for s in sets:
        s.works = False
    with instructions.tried_once():
        assert cpu_vec_isa.pick_vec_isa() is cpu_vec_isa.invalid_vec_isa


@linux
def test_a_setting_that_asks_for_another_set_gets_it(sets, monkeypatch):
    with config.patch({"cpp.simdlen": 256}), instructions.tried_once():
        assert cpu_vec_isa.pick_vec_isa() is sets[3]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    with instructions.tried_once():
        assert cpu_vec_isa.pick_vec_isa() is sets[3]


@linux
def test_this_processor_gets_the_set_that_inductor_chooses():
    with instructions.tried_once():
        ours = cpu_vec_isa.pick_vec_isa()
    assert ours is cpu_vec_isa.pick_vec_isa()


@linux
def test_trials_begin_on_another_thread_which_is_waited_for(sets, monkeypatch):
    """So the set is known earlier, and no trial runs twice at once."""
    begun, may_end, together = threading.Event(), threading.Event(), []
    tries = Set.__bool__

    def slowly(self):
        together.append(threading.current_thread())
        begun.set()
        assert may_end.wait(30)
        together.append(threading.current_thread())
        return tries(self)

    monkeypatch.setattr(Set, "__bool__", slowly)
    monkeypatch.setattr("torch._inductor.codecache.CppPythonBindingsCodeCache.load_pybinding_async", lambda *a: None)
    ahead = threading.Thread(target=instructions._ahead)
    ahead.start()
    assert begun.wait(30)
    threading.Timer(0.05, may_end.set).start()
    assert instructions._first() == [sets[2]]
    ahead.join()
    assert together[0] is ahead and all(a is b for a, b in zip(together[::2], together[1::2], strict=True))


@linux
def test_a_failure_ahead_is_left_to_the_compiler(sets, monkeypatch):
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: 1 / 0)
    instructions._ahead()
    with pytest.raises(ZeroDivisionError):
        instructions._first()


@linux
def test_a_set_works_only_if_torch_has_its_functions():
    """The trial without torch's headers is one of the compiler, the processor and torch's library still."""
    with instructions.tried_once():
        chosen = cpu_vec_isa.pick_vec_isa()
    assert not chosen or chosen.check_build(instructions._TRIAL)
    assert not chosen.check_build(instructions._TRIAL.replace("_u10", "_u10missing"))
    assert "vec.h" in cpu_vec_isa.VecISA._avx_code  # outside of the context Inductor tries as before
