"""The assignment on hand-made programs with a known optimum, and the clock it believes in."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhc_compile.scheduler.assign import LOOKAHEAD, MAIN_KINDS, Move, assign, grown_subset, place, play
from mhc_compile.scheduler.contention import Contention, Pair
from mhc_compile.scheduler.dag import Dag, Task


def table(hidden: float, stretch: float = 1.0, *mains: str) -> Contention:
    """Every main kind beside the kind ``s`` of 100 bytes."""
    kinds = mains or MAIN_KINDS
    return Contention(
        "test", tuple(Pair(main, "s", 100, False, 1.0, 1.0, hidden, hidden, hidden, stretch) for main in kinds)
    )


def side(name: str, seconds: float) -> Task:
    return Task(name, seconds, "s", 100)


def movable(task: Task) -> bool:
    return task.kind == "s"


def gradient(seconds: float = 1.0) -> Dag:
    """m1 (4), then s, which nothing reads, then m2 (4)."""
    return Dag([Task("m1", 4.0, "matmul"), side("s", seconds), Task("m2", 4.0, "matmul")], [("m1", "s"), ("m1", "m2")])


def between() -> Dag:
    """c (1) -> branch (4) -> post (1), and c -> s (2) -> post: Sinkhorn beside the branch."""
    tasks = [Task("c", 1.0), side("s", 2.0), Task("branch", 4.0, "matmul"), Task("post", 1.0)]
    return Dag(tasks, [("c", "s"), ("c", "branch"), ("s", "post"), ("branch", "post")])


@pytest.mark.parametrize(
    ("hidden", "stretch", "seconds"),
    [(1.0, 1.0, 8.0), (0.5, 1.0, 8.5), (0.5, 2.0, 8.5), (1.0, 3.0, 8.0), (0.0, 2.0, 9.0)],
)
def test_a_hidden_part_is_gained(hidden: float, stretch: float, seconds: float) -> None:
    moves = [Move("s", 2, 3)]
    assert play(gradient(), moves, table(hidden, stretch))[0] == pytest.approx(seconds)


def test_a_pair_that_loses_makes_the_program_longer() -> None:
    assert play(gradient(), [Move("s", 2, 3)], table(-1.0))[0] == pytest.approx(10.0)


def test_what_was_not_measured_is_one_stream() -> None:
    assert play(gradient(), [Move("s", 2, 3)], Contention("test"))[0] == pytest.approx(9.0)
    plan = assign(gradient(), movable, Contention("test"))
    assert plan.moves == []
    assert plan.reason == "nothing was measured of s"
    assert assign(Dag([Task("m", 1.0)]), movable, table(1.0)).reason == "no call of this graph can move"


def test_a_gradient_that_nobody_reads_runs_beside_what_follows() -> None:
    plan = assign(gradient(), movable, table(1.0))
    assert [move.task for move in plan.moves] == ["s"]
    assert (plan.serial, plan.predicted) == (9.0, 8.0)
    assert plan.gain == pytest.approx(1 / 9)
    assert {one.stream for one in plan.timeline} == {"main", "side"}


def test_side_work_before_a_reader_runs_beside_the_branch() -> None:
    plan = assign(between(), movable, table(1.0, 1.5))
    assert plan.predicted == pytest.approx(6.0)
    assert plan.moves[0].join == 3, "done before post"


def test_a_side_task_longer_than_its_window_is_waited_for() -> None:
    dag = Dag([Task("c", 1.0), side("s", 6.0), Task("branch", 4.0, "matmul"), Task("post", 1.0)], between().graph.edges)
    seconds, timeline = play(dag, [Move("s", 2, 3)], table(1.0))
    assert seconds == pytest.approx(8.0)
    assert [one.name for one in timeline if one.stream == "wait"] == ["s"]


def test_a_gain_that_is_noise_is_not_taken() -> None:
    plan = assign(gradient(0.01), movable, table(1.0))
    assert plan.moves == []
    assert "below" in plan.reason
    assert plan.predicted == plan.serial
    assert assign(gradient(0.01), movable, table(1.0), least_gain=0.0).moves != []


def test_priority_asks_for_its_own_measurement() -> None:
    assert assign(gradient(), movable, table(1.0), priority=True).moves == []


def replayed(seconds: float) -> Dag:
    """Four branches (3 each), then a replay that could run at any time, then what reads it."""
    tasks = [*(Task(f"m{i}", 3.0, "matmul") for i in range(4)), side("replay", seconds), Task("read", 1.0)]
    return Dag(tasks, [*((f"m{i}", f"m{i + 1}") for i in range(3)), ("m3", "read"), ("replay", "read")])


def test_a_replay_is_brought_forward_no_further_than_it_has_to() -> None:
    """Beside the last branch that is long enough: its states are held from there."""
    assert place(replayed(1.5), "replay", table(1.0)) == Move("replay", 3, 5)
    assert assign(replayed(1.5), movable, table(1.0)).predicted == pytest.approx(13.0)
    assert place(replayed(3.0), "replay", table(1.0)) == Move("replay", 2, 5), "over as many as it needs"


def test_a_task_starts_before_a_gate() -> None:
    """Not beside what hides it best, where nothing can be started, but where the least is lost of the rest."""
    branch = [Task("m", 4.0, "matmul"), Task("a", 4.0, "attention"), Task("o", 4.0, "matmul")]
    dag = Dag([side("s", 1.0), *branch, Task("read", 1.0)], [("m", "a"), ("a", "o"), ("o", "read"), ("s", "read")])
    hides = beside(matmul=0.6, attention=0.9)
    assert place(dag, "s", hides, gates={"m", "o"}) == Move("s", 1, 4)
    assert place(dag, "s", hides, gates={"a", "o"}) == Move("s", 2, 4)
    assert place(dag, "s", hides, gates={"read"}) is None
    assert assign(dag, movable, hides, gates=set()).reason == "1 calls could move and have no place to start"


def test_what_stands_early_starts_early() -> None:
    """Its results are held from there on one stream too, and it may take longer than anybody predicts."""
    tasks = [side("s", 1.0), *(Task(f"m{i}", 3.0, "matmul") for i in range(4)), Task("read", 1.0)]
    dag = Dag(tasks, [*((f"m{i}", f"m{i + 1}") for i in range(3)), ("m3", "read"), ("s", "read")])
    assert place(dag, "s", table(1.0)) == Move("s", 0, 5)


def test_a_task_that_is_waited_for_stays_as_slow_as_it_was() -> None:
    """It fills what a matmul left over, and not more when that one is done."""
    dag = Dag([Task("c", 1.0), side("s", 2.0), Task("m", 4.0, "matmul"), Task("read", 1.0)],
              [("c", "s"), ("c", "m"), ("s", "read"), ("m", "read")])  # fmt: skip
    assert play(dag, [Move("s", 2, 3)], table(1.0, 4.0))[0] == pytest.approx(1.0 + 8.0 + 1.0)
    assert assign(dag, movable, table(1.0, 4.0)).moves == []


def test_a_gradient_whose_halves_are_added_starts_at_once() -> None:
    """The addition has been put off to the end; the gradient need not be, with nothing to run beside there."""
    tasks = [
        Task("m1", 4.0, "matmul"),
        side("s", 1.0),
        *(Task(f"m{i}", 4.0, "matmul") for i in (2, 3)),
        Task("add", 0.1),
    ]
    dag = Dag(tasks, [("m1", "s"), ("m1", "m2"), ("m2", "m3"), ("s", "add")])
    assert place(dag, "s", table(1.0)) == Move("s", 1, 3)
    waited = Dag([*tasks, Task("end", 1.0)], [*dag.graph.edges, ("m3", "add"), ("add", "end")])
    assert place(waited, "s", table(1.0)) == Move("s", 1, 4), "somebody waits, at the end"


def beside(**hidden: float) -> Contention:
    """A share of ``s`` that is hidden beside each kind of main task."""
    pairs = (Pair(kind, "s", 100, False, 1.0, 1.0, one, one, one, 1.0) for kind, one in hidden.items())
    return Contention("test", tuple(pairs))


def test_a_gradient_waits_for_what_hides_it() -> None:
    """Attention hides most of it, a matmul next to nothing: it is put off, to the first attention and no further."""
    kinds = ["matmul", "matmul", "attention", "matmul", "attention"]
    tasks = [Task("m0", 4.0, "matmul"), side("s", 1.0), *(Task(f"t{i}", 4.0, kind) for i, kind in enumerate(kinds))]
    chain = ["m0", *(f"t{i}" for i in range(len(kinds)))]
    dag = Dag(tasks, [("m0", "s"), *itertools.pairwise(chain)])
    move = place(dag, "s", beside(matmul=0.1, attention=0.9))
    assert move is not None
    assert dag.order[move.fork] == "t2"
    assert assign(dag, movable, beside(matmul=0.1, attention=0.9)).predicted == pytest.approx(24.1)
    alike = place(dag, "s", beside(matmul=0.9, attention=0.9))
    assert alike is not None
    assert alike.fork == 1, "its inputs are held no longer than needed"


def test_a_gradient_is_not_put_off_for_ever() -> None:
    many = int(LOOKAHEAD) + 2
    tasks = [side("s", 1.0), *(Task(f"m{i}", 1.0, "matmul") for i in range(many)), Task("a", 4.0, "attention")]
    dag = Dag(tasks, itertools.pairwise([*(f"m{i}" for i in range(many)), "a"]))
    move = place(dag, "s", beside(matmul=0.1, attention=1.0))
    assert move is not None
    assert move.fork == 0


def test_side_work_with_a_reader_is_put_beside_what_hides_it() -> None:
    """Neither as early nor as late as it fits: beside the attention in the middle of its branch."""
    branch = [Task("m", 4.0, "matmul"), Task("a", 4.0, "attention"), Task("o", 4.0, "matmul")]
    dag = Dag([side("s", 1.0), *branch, Task("read", 1.0)], [("m", "a"), ("a", "o"), ("o", "read"), ("s", "read")])
    assert place(dag, "s", beside(matmul=0.1, attention=0.9)) == Move("s", 2, 4)


def test_nothing_to_run_beside() -> None:
    dag = Dag([Task("a", 1.0), side("s", 1.0), Task("b", 1.0)], [("a", "s"), ("s", "b")])
    assert place(dag, "s", table(1.0)) is None


def test_a_part_made_early_counts_only_if_the_rest_moves() -> None:
    tasks = [Task("early", 0.5), side("s", 2.0), Task("branch", 4.0, "matmul"), Task("post", 1.0)]
    dag = Dag(tasks, [("early", "branch"), ("s", "post"), ("branch", "post")])
    plan = assign(dag, movable, table(1.0), extra={"s": "early"})
    assert (plan.serial, plan.predicted) == (7.0, 5.5)
    plan = assign(dag, movable, table(0.1), extra={"s": "early"})
    assert plan.moves == [], "0.2 hidden, 0.5 more to do"
    assert plan.predicted == 7.0


def communicating(*between_start_and_wait: Task) -> Dag:
    """m (1) -> reduce (4, on the network) -> wait; s (2) hangs on m."""
    tasks = [
        Task("m", 1.0, "matmul"), Task("reduce", 4.0, "communication"), side("s", 2.0), *between_start_and_wait,
        Task("wait", 0.0, "wait"), Task("end", 1.0),
    ]  # fmt: skip
    return Dag(tasks, [("m", "reduce"), ("m", "s"), ("reduce", "wait"), ("wait", "end"), ("s", "end")])


def test_communication_runs_beside_the_program() -> None:
    assert play(communicating(), [], Contention("test"))[0] == pytest.approx(6.0), "s is under the reduce already"
    seconds, timeline = play(communicating(Task("x", 3.0, "matmul")), [], Contention("test"))
    assert seconds == pytest.approx(7.0)
    assert [one.stream for one in timeline if one.name == "reduce"] == ["communication"]


def test_side_work_is_placed_under_communication() -> None:
    """s stands before the reduce starts: on one stream it delays it, on the side it runs under it."""
    tasks = [
        Task("m", 1.0, "matmul"), side("s", 2.0), Task("n", 1.0, "matmul"), Task("reduce", 4.0, "communication"),
        Task("wait", 0.0, "wait"), Task("end", 1.0),
    ]  # fmt: skip
    dag = Dag(tasks, [("m", "s"), ("m", "n"), ("n", "reduce"), ("reduce", "wait"), ("wait", "end"), ("s", "end")])
    plan = assign(dag, movable, table(0.8, 1.25, "communication"))
    assert plan.serial == pytest.approx(9.0)
    assert plan.predicted == pytest.approx(7.0 + 0.4)
    assert [move.task for move in plan.moves] == ["s"]
    assert assign(dag, movable, Contention("test")).moves == []


@st.composite
def programs(draw: st.DrawFn) -> Dag:
    """A main chain with side tasks that hang on a task of it and are read by a later one, or by none."""
    length = draw(st.integers(2, 5))
    tasks, edges = [], []
    for index in range(length):
        tasks.append(Task(f"m{index}", draw(st.integers(1, 5)), draw(st.sampled_from(["matmul", "memory"]))))
        if index:
            edges.append((f"m{index - 1}", f"m{index}"))
        if draw(st.booleans()):
            tasks.append(side(f"s{index}", draw(st.integers(1, 4))))
            edges.append((f"m{index}", f"s{index}"))
            reader = draw(st.integers(index + 1, length))
            if reader < length:
                edges.append((f"s{index}", f"m{reader}"))
    return Dag(tasks, edges)


@settings(max_examples=60, deadline=None)
@given(programs(), st.sampled_from([-0.5, 0.0, 0.5, 1.0]), st.sampled_from([1.0, 2.0]))
def test_plans_are_never_slower_and_of_few_moves_the_best(dag: Dag, hidden: float, stretch: float) -> None:
    contention = table(hidden, stretch)
    plan = assign(dag, movable, contention, least_gain=0.0)
    assert plan.predicted <= plan.serial + 1e-9
    assert plan.predicted >= dag.span() - 1e-9
    assert plan.predicted == pytest.approx(play(dag, plan.moves, contention)[0])
    if hidden <= 0:
        assert plan.moves == []
    places = [move for task in dag.tasks.values() if movable(task) if (move := place(dag, task.name, contention))]
    subsets = itertools.chain.from_iterable(itertools.combinations(places, size) for size in range(len(places) + 1))
    best = min(play(dag, subset, contention)[0] for subset in subsets)
    assert plan.predicted == pytest.approx(best)
    grown = grown_subset(places, lambda moves: play(dag, moves, contention)[0])
    assert best - 1e-9 <= play(dag, grown, contention)[0] <= plan.serial + 1e-9
