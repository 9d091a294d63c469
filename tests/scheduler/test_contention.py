"""The table of pairs: what it answers, what it does not, and its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mhc_compile.scheduler import contention
from mhc_compile.scheduler.contention import Alone, Contention, Pair
from mhc_compile.scheduler.host import Host


def pair(main: str = "matmul", side: str = "s", size: int = 1000, hidden: float = 0.5, **more: object) -> Pair:
    interval = {"low": hidden - 0.1, "high": hidden + 0.1}
    values = {"priority": False, "main_seconds": 1e-3, "side_seconds": 1e-5, "stretch": 2.0, **interval, **more}
    return Pair(main=main, side=side, bytes=size, hidden=hidden, **values)  # type: ignore[arg-type]  # a table of fields


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHC_COMPILE_CACHE_DIR", str(tmp_path))


def test_the_nearest_measurement_answers_and_a_far_one_does_not() -> None:
    table = Contention("gpu", (pair(size=1000, hidden=0.1), pair(size=8000, hidden=0.9)))
    assert table.pair("matmul", "s", 900) == table.pairs[0]
    assert table.pair("matmul", "s", 7000) == table.pairs[1]
    assert table.pair("matmul", "s", 100) is None
    assert table.pair("matmul", "s", 100_000) is None
    assert table.pair("memory", "s", 1000) is None
    assert table.pair("matmul", "t", 1000) is None
    assert table.pair("matmul", "s", 1000, priority=True) is None
    assert table.knows("s", 1000)
    assert not table.knows("s", 1000, priority=True)


def test_seconds_grow_with_bytes_and_never_shrink_below_what_was_measured() -> None:
    table = Contention("gpu", (pair(size=1000), pair(main="memory", size=1000, side_seconds=3e-5)))
    assert table.seconds("s", 1000) == pytest.approx(2e-5)
    assert table.seconds("s", 2000) == pytest.approx(4e-5)
    assert table.seconds("s", 500) == pytest.approx(2e-5)
    assert table.seconds("s", 10) is None


def test_a_task_that_stays_has_a_time_and_no_pair() -> None:
    table = Contention("gpu", (), (Alone("rest", 1000, 3e-6),))
    assert table.seconds("rest", 1000) == pytest.approx(3e-6)
    assert table.seconds("rest", 10_000) is None
    assert not table.knows("rest", 1000)


@pytest.mark.parametrize(
    ("hidden", "low", "high", "share"),
    [
        (0.5, 0.4, 0.6, 0.5),
        (0.4, 0.35, 0.45, 0.0),
        (0.3, -0.1, 0.7, 0.0),
        (-0.4, -0.9, 0.0, 0.0),
        (-0.4, -0.5, -0.3, -0.4),
        (1.4, 1.1, 1.6, 1.0),
    ],
)
def test_noise_and_small_shares_are_planned_with_as_none(hidden: float, low: float, high: float, share: float) -> None:
    assert pair(hidden=hidden, low=low, high=high).share == share


def test_the_interval_of_a_median() -> None:
    assert contention.interval(range(1, 16)) == (8, 4, 12)  # 96 %: 3 of 15 coins or fewer 1.8 % on either side
    assert contention.interval([5.0, 1.0, 3.0]) == (3.0, 1.0, 5.0)
    assert contention.interval([7.0]) == (7.0, 7.0, 7.0)
    assert contention.interval([1, 2, 3, 4, 5, 100]) == (3.5, 1, 100)
    assert contention.interval([*[1.0] * 20, *[9.0] * 5]) == (1.0, 1.0, 1.0), "an outlier counts as one value"


def test_a_file_and_back() -> None:
    pairs, alone = (pair(), pair(main="memory", priority=True)), (Alone("rest", 10, 1e-6),)
    table = Contention("NVIDIA H200", pairs, alone, Host(5e-5, 3e-4))
    assert contention.load("NVIDIA H200") is None
    path = contention.save(table)
    assert path is not None
    assert path.name.startswith("contention-nvidia-h200-torch-")
    assert contention.load("NVIDIA H200") == table
    assert contention.load("another") is None
    assert table.fingerprint != Contention("NVIDIA H200", (pair(),)).fingerprint


@pytest.mark.parametrize("text", ["", "[]", '{"device": "gpu", "pairs": [{"main": 1}]}', '{"device": "gpu"}'])
def test_a_damaged_file_is_no_file(text: str) -> None:
    path = contention.save(Contention("gpu", (pair(),)))
    assert path is not None
    path.write_text(text)
    assert contention.load("gpu") is None


@pytest.mark.parametrize("wrong", [{"low": float("nan")}, {"side_seconds": 0.0}, {"stretch": float("inf")}])
def test_numbers_that_cannot_be_are_no_file(wrong: dict[str, float]) -> None:
    contention.save(Contention("gpu", (pair(**wrong),)))  # type: ignore[arg-type]  # a table of fields
    assert contention.load("gpu") is None


def test_a_directory_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MHC_COMPILE_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert contention.save(Contention("gpu", (pair(),))) is None


@pytest.mark.parametrize("host", [Host(0.0, 1e-4), Host(1e-4, float("nan"))])
def test_a_host_that_cannot_be_is_no_file(host: Host) -> None:
    contention.save(Contention("gpu", (pair(),), host=host))
    assert contention.load("gpu") is None


@pytest.mark.gpu
def test_measured_on_a_device() -> None:
    import torch

    x = torch.randn(256, 256, device="cuda")
    tiny = contention.Case("tiny", lambda: torch.sin(x), 2 * x.numel() * 4)
    found = contention.measure([tiny], contention.main_cases(512, 256), priority=True, rounds=7)
    assert {one.main for one in found} == {"matmul", "attention", "attention_backward", "memory"}
    assert all(one.side_seconds > 0 and one.stretch >= 1 and one.hidden < 3 for one in found)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        alone = contention.time_more(tiny, stream, 7)
        twice = contention.Case("twice", lambda: (tiny.call(), tiny.call()), 1, tiny.call)
        assert 0.3 * alone < contention.time_more(twice, stream, 7) < 3 * alone


def test_the_table_as_text() -> None:
    table = Contention("gpu", (pair(hidden=-0.5, priority=True),), (Alone("rest", 10, 2e-6),))
    lines = contention.table(table).splitlines()
    assert lines[0].startswith("gpu: ")
    assert lines[1].split() == [
        "s",
        "matmul",
        "main",
        "first",
        "10.0",
        "us",
        "beside",
        "1000.0",
        "us",
        "-50%",
        "(-60%",
        "..",
        "-40%)",
        "2.0",
        "x",
    ]
    assert lines[2].split() == ["rest", "2.0", "us", "on", "the", "main", "stream"]
