"""The training example: its table and its plot, and that a run survives whatever stops it."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "train_float8.py"
FLOAT16, FLOAT8 = "mixed_float16", "float8_from_mixed_bfloat16"
TINY = ("--quick", "--policies", FLOAT8)


@pytest.fixture(scope="module")
def fast(tmp_path_factory) -> dict[str, str]:
    """An environment that compiles fast and once: these tests compile the same program thrice."""
    return {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, fast):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder, *TINY, **fast)
    return folder


def weights(folder: Path, policy: str = FLOAT8) -> str:
    return json.loads((folder / policy / "result.json").read_text())["weights_sha256"]


def history(folder: Path, policy: str = FLOAT8) -> list[float]:
    lines = (folder / policy / "history.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE), *arguments, "--output", str(folder)],
        env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, *arguments: str, **environment: str) -> None:
    process = start(folder, *arguments, **environment)
    out, _ = process.communicate()
    assert process.returncode == 0, out


def outcome_of(example, bits: float, step_time: float = 0.1, **fields):
    """An Outcome as if it had been measured."""
    given = {"skipped_steps": 0, "loss_scale": 1.0, "weights_sha256": "0" * 64} | fields
    return example("train_float8_report").Outcome(
        losses=[8.0, bits], step_times=[step_time], bits_per_byte=bits, **given
    )


def test_a_run_leaves_results_curves_and_two_checkpoints(finished):
    assert (finished / "train_float8.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (finished / FLOAT8 / "checkpoints").iterdir()) == [
        "27",
        "30",
    ]
    losses = history(finished)
    assert len(losses) == 30 and 0 < losses[-1] < losses[0] < 10
    assert not [path for path in finished.rglob("*") if path.name.startswith(".")]


def test_a_run_that_ended_is_reported_again_and_not_trained_again(example, finished, capsys):
    before = (finished / FLOAT8 / "result.json").stat().st_mtime_ns
    assert example("train_float8").main(["--resume", "--output", str(finished)]) == 0
    assert (finished / FLOAT8 / "result.json").stat().st_mtime_ns == before
    assert weights(finished) in capsys.readouterr().out


def kill_in_training(folder: Path, *arguments: str, **environment: str) -> None:
    process = start(folder, *arguments, **environment)
    while not (folder / FLOAT8 / "checkpoints" / "6").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / FLOAT8 / "result.json").exists()


@pytest.mark.slow
def test_a_run_killed_in_training_ends_with_the_same_weights(finished, tmp_path, fast):
    kill_in_training(tmp_path, *TINY, **fast)
    run(tmp_path, "--resume", **fast)
    assert weights(tmp_path) == weights(finished)
    assert history(tmp_path) == history(finished)


@pytest.mark.slow
def test_a_run_of_nnx_killed_in_training_ends_with_the_same_weights(finished, tmp_path, fast):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, *TINY, "--nnx", **fast)
    kill_in_training(killed, *TINY, "--nnx", **fast)
    run(killed, "--resume", **fast)
    assert weights(killed) == weights(whole) != weights(finished)
    assert history(killed) == history(whole)


@pytest.mark.slow
def test_a_run_killed_at_random_points_ends_with_the_same_weights(tmp_path, fast):
    """Kills MPJAX_KILLS times (2 if that is not set).

    A run that was killed is continued, and one in three is killed again. One that ends before its
    kill is compared as well, and tells how long a run takes by now.
    """
    wanted, kills = int(os.environ.get("MPJAX_KILLS", "2")), 0
    arguments = ("--quick", "--resume", "--policies", FLOAT16, FLOAT8)
    whole = tmp_path / "whole"
    run(whole, *arguments, **fast)  # compiles, so that only the next one is a measure of time
    seconds = None
    for i in itertools.count():
        folder, done, again = tmp_path / f"run_{i}", False, 1.0
        while not done:
            strike = seconds and kills < wanted and random.random() < again
            wait, started = random.uniform(0, seconds) if strike else None, time.perf_counter()
            done, out = ended(process := start(folder, *arguments, **fast), wait)
            if not done:
                kills, again = kills + 1, 1 / 3
                print(f"kill {kills}, run {i}, after {wait:.2f} s: {progress(folder)}")
        assert process.returncode == 0, out
        for policy in (FLOAT16, FLOAT8):
            assert weights(folder, policy) == weights(whole, policy)
            assert history(folder, policy) == history(whole, policy)
        print(f"run {i} ends with the same weights")
        if again == 1:
            seconds = time.perf_counter() - started
        if kills == wanted:
            return


def ended(process: subprocess.Popen[str], seconds: float | None) -> tuple[bool, str]:
    """Whether a process ended by itself within so many seconds, and what it said; or kills it."""
    try:
        return True, process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        return process.returncode != -signal.SIGKILL, out


def progress(folder: Path) -> str:
    """How far a run in a folder came: for each policy, its checkpoints and what else is there."""
    found = (sorted(path.name for path in folder.glob(f"{p}/*/*")) for p in (FLOAT16, FLOAT8))
    return "; ".join(" ".join(names) or "nothing" for names in found)


def test_a_history_keeps_the_steps_of_the_checkpoint_and_no_torn_line(example, tmp_path):
    files, path = example("train_float8_files"), tmp_path / "history.jsonl"
    first = files.History(path, 0)
    for loss in (8.0, 7.5, float("nan")):
        first.append(loss, None if loss == 8 else 0.25)
    first.close()
    with path.open("a") as file:
        file.write('{"loss": 6.')  # a line that was being written
    second = files.History(path, 2)
    second.append(7.0, 0.5)
    second.close()
    assert files.read_history(path) == ([8.0, 7.5, 7.0], [0.25, 0.5])


def test_a_history_shorter_than_its_checkpoint_is_an_error(example, tmp_path):
    (tmp_path / "history.jsonl").write_text('{"loss": 8.0, "seconds": null}\n')
    with pytest.raises(ValueError, match="has 1 steps, but the checkpoint beside it is of step 3"):
        example("train_float8_files").History(tmp_path / "history.jsonl", 3)


def test_the_digest_sees_a_bit_a_name_a_shape_and_a_dtype(example):
    digest = example("train_float8_run").digest
    x = np.array([1.0, 2.0], np.float32)
    trees = [
        {"a": x, "b": x},
        {"a": x, "b": np.nextafter(x, 3, dtype=np.float32)},
        {"a": x, "c": x},
        {"a": x, "b": x[:, None]},
        {"a": x, "b": x.view(np.int32)},
    ]
    assert len({digest(tree) for tree in trees}) == len(trees)
    assert digest({"b": x, "a": x}) == digest(trees[0])


@pytest.fixture
def claim(example, tmp_path):
    """Claims a folder with options, for a text of 9 bytes."""
    options = example("train_float8_options")

    def claim(*arguments: str, text: bytes = b"some text"):
        given = options.make_parser("").parse_args([*arguments, "--output", str(tmp_path / "run")])
        return options.claim_folder(given, np.frombuffer(text, np.uint8))

    return claim


def test_a_folder_that_holds_a_run_is_continued_only_when_asked(claim):
    claim("--quick", "--steps", "7")
    with pytest.raises(ValueError, match="holds a run already: continue it with --resume, or"):
        claim("--quick", "--steps", "7")
    assert claim("--resume") == claim("--resume", "--quick", "--steps", "7", "--seed", "0")


def test_resume_begins_a_run_where_there_is_none(claim):
    plan = claim("--resume", "--seed", "3", "--policies", FLOAT8, FLOAT16, FLOAT8)
    assert plan.settings.seed == 3 and plan.policies == (FLOAT8, FLOAT16)
    assert claim("--resume") == plan


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (("--steps", "8"), "`steps` is 7 there, 8 here"),
        (("--seed", "1"), "`seed` is 0 there, 1 here"),
        (("--policies", FLOAT8), r"`policies` is \['mixed_float16'\] there, \['float8_from_"),
    ],
)
def test_a_run_of_something_else_is_not_continued(claim, arguments, difference):
    claim("--steps", "7", "--policies", FLOAT16)
    with pytest.raises(ValueError, match=f"holds a run of something else: {difference}.*Ask for"):
        claim("--resume", *arguments)


def test_a_full_run_is_not_continued_as_a_quick_one_nor_on_another_text(claim):
    claim()
    with pytest.raises(ValueError, match="`quick` is False there, True here"):
        claim("--resume", "--quick")
    with pytest.raises(ValueError, match="`text_sha256` is b94f6f125c79"):
        claim("--resume", text=b"another text")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--steps", "0"), "--steps is 0: at least 1"), (("--seed", "-1"), "--seed is -1: at least")],
)
def test_options_out_of_range_are_refused_before_anything_is_written(
    claim, tmp_path, arguments, message
):
    with pytest.raises(ValueError, match=message):
        claim(*arguments)
    assert not list(tmp_path.iterdir())


def test_the_command_line_says_what_is_wrong_and_exits_with_2(example, finished, capsys):
    with pytest.raises(SystemExit, match="2"):
        example("train_float8").main(["--resume", "--seed", "5", "--output", str(finished)])
    assert "holds a run of something else: `seed` is 0 there, 5 here" in capsys.readouterr().err


def test_the_table_has_every_figure_beside_that_of_mixed_bfloat16(example):
    outcomes = {
        "mixed_bfloat16": outcome_of(example, 2.0),
        FLOAT16: outcome_of(example, 2.01, 0.15, skipped_steps=2, loss_scale=8192.0),
        FLOAT8: outcome_of(example, 1.99, 0.05),
    }
    table = example("train_float8_report").make_table(outcomes)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("mixed_bfloat16", "2.0000", "+0.000%", "0.1000", "1.00x", "0", "1"),
        (FLOAT16, "2.0100", "+0.500%", "0.1500", "1.50x", "2", "8192"),
        (FLOAT8, "1.9900", "-0.500%", "0.0500", "0.50x", "0", "1"),
    ]


@pytest.mark.parametrize(("slow", "said"), [("float32", False), (FLOAT8, True)])
def test_a_line_says_what_is_slower_and_that_8_bits_save_nothing_only_if_so(example, slow, said):
    outcomes = {
        "mixed_bfloat16": outcome_of(example, 2.0),
        slow: outcome_of(example, 2.0, 0.15, weights_sha256="ab" * 32),
    }
    lines = example("train_float8_report").remarks(outcomes)
    assert lines[0] == f"A step under {slow} takes 1.50 times as long as under mixed_bfloat16."
    assert lines[1].startswith("So 8 bits save no time here") == said
    assert lines[-1] == f"  {'ab' * 32}  {slow}"


def test_without_mixed_bfloat16_there_is_nothing_to_compare_with(example):
    report, outcomes = example("train_float8_report"), {FLOAT8: outcome_of(example, 2.0)}
    row = [list(column.cells) for column in report.make_table(outcomes).columns]
    assert row[2] == row[4] == ["-"] and report.targets(outcomes) == []


@pytest.mark.parametrize(("bits", "status"), [(2.019, 0), (2.021, 1), (1.979, 1), (np.nan, 1)])
def test_a_policy_that_is_not_within_one_percent_fails_the_run(
    example, tmp_path, capsys, monkeypatch, bits, status
):
    outcomes = {"mixed_bfloat16": outcome_of(example, 2.0), FLOAT8: outcome_of(example, bits)}
    script = example("train_float8")
    monkeypatch.setattr(script, "run_policy", lambda policy, *rest: outcomes[policy])
    assert script.main(["--policies", *outcomes, "--output", str(tmp_path)]) == status
    assert ("MISSED" in capsys.readouterr().out) == bool(status)


def test_a_missing_package_names_the_extra(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    process = start(tmp_path / "run", PYTHONPATH=path)
    out, _ = process.communicate()
    assert process.returncode == 1 and not (tmp_path / "run").exists()
    assert out == (
        'the example needs `matplotlib`, which is not installed: pip install "mpjax[demo]"\n'
    )
