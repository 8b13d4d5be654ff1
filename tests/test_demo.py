"""The demo: how it splits its text, what its report says, and that it runs, in both Flax APIs."""

import importlib
import io
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path, PurePosixPath

import jax
import numpy as np
import pytest
from helpers import assert_trees_equal

import mpjax as mp

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "byte_lm.py"


@pytest.fixture
def demo(monkeypatch):
    """Imports a file of the demo by its name, as the script beside it would."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


@pytest.fixture
def data(demo):
    return demo("byte_lm_data")


@pytest.fixture
def library(tmp_path):
    """A library of 200 files, each holding its own path, and some that do not count."""
    for i in range(200):
        path = tmp_path / f"package_{i % 7}" / f"module_{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# package_{i % 7}/module_{i}.py\n")
    for skipped in ("test/a.py", "lib/tests/a.py", "site-packages/a.py", "config-3.11/a.py", "a.c"):
        path = tmp_path / skipped
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("skipped")
    return tmp_path


def test_the_library_is_listed_sorted_and_without_tests(data, library):
    files = data.library_files(library)
    assert len(files) == 200 and files == sorted(files)
    assert all(path.parts[0].startswith("package_") for path in files)


def test_each_file_is_on_one_side_of_the_split_and_whole(data, library):
    train, held_out = (set(part.tobytes().decode().splitlines()) for part in data.load(library))
    assert not train & held_out
    assert train | held_out == {f"# {path}" for path in data.library_files(library)}
    assert held_out == {
        f"# {path}" for path in data.library_files(library) if data.is_held_out(path)
    }


def test_the_split_depends_on_the_relative_path_alone(data, library):
    first, second = data.load(library), data.load(library)
    np.testing.assert_array_equal(first[1], second[1])
    # From `sha256sum`, so that no other hash and no other place of the library passes.
    held_out = [i for i in range(200) if data.is_held_out(PurePosixPath(f"package/{i}.py"))]
    assert held_out == [20, 59, 79, 121, 132, 146, 152, 171, 172, 177, 193]


def test_this_python_has_a_library_to_train_on_and_files_held_out(data):
    train, held_out = data.load()
    assert train.size > 4_000_000 and 50_000 < held_out.size < train.size / 8


def test_a_library_without_sources_is_refused(data, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="0 bytes of Python source to train on and 0 held out"
    ):
        data.load(tmp_path)


def test_every_held_out_byte_is_predicted_once_from_the_byte_before_it(data):
    text = np.arange(1, 101, dtype=np.uint8)
    batches = data.evaluation_batches(text, context=8, batch=3)
    inputs, targets, weights = (np.concatenate([b[i].ravel() for b in batches]) for i in range(3))
    np.testing.assert_array_equal(targets[weights == 1], text)
    np.testing.assert_array_equal(inputs[weights == 1], np.arange(100))
    assert weights.sum() == 100 and all(x.shape == (3, 8) for batch in batches for x in batch)


def test_training_targets_are_the_inputs_one_byte_later_and_follow_the_seed(data):
    text = np.arange(200, dtype=np.uint8)
    first, again, other = (data.training_batches(text, 8, 4, 5, seed) for seed in (0, 0, 1))
    assert len(first) == 5
    for inputs, targets in first:
        assert inputs.shape == targets.shape == (4, 8)
        np.testing.assert_array_equal(targets, inputs + 1)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("text", "entropy"),
    [(b"aaaa", 0.0), (b"abab", 1.0), (bytes(range(256)), 8.0), (b"aabc", 1.5)],
)
def test_entropy_of_known_bytes(data, text, entropy):
    assert data.order0_entropy(np.frombuffer(text, np.uint8)) == entropy


def test_zlib_bits_are_those_of_the_whole_text_at_level_9(data):
    text = np.frombuffer(b"import this\n" * 50, np.uint8)
    assert data.zlib_bits_per_byte(text) == 8 * len(zlib.compress(b"import this\n" * 50, 9)) / 600


@pytest.mark.slow
@pytest.mark.parametrize("api", ["LinenRun", "NNXRun"])
def test_both_policies_start_from_the_same_weights_and_int8_takes_fewer_bytes(demo, api):
    runs, report, settings = demo("byte_lm_runs"), demo("byte_lm_report"), demo("byte_lm").QUICK
    tx = runs.make_optimizer(1e-3, 3)
    make = getattr(runs, api)
    f32, bf16 = (make(policy, settings.shape, 0, tx) for policy in ("float32", "mixed_bfloat16"))
    assert_trees_equal(jax.tree.leaves(bf16.weights()), jax.tree.leaves(f32.weights()))
    before = report.tree_bytes(bf16.weights())
    int8 = bf16.quantized()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(int8.weights())} == {"int8", "float32"}
    assert report.tree_bytes(bf16.weights()) == before > report.tree_bytes(int8.weights())


def test_the_full_size_int8_tree_keeps_its_promise_by_arithmetic(demo):
    shape = demo("byte_lm").Settings().shape
    d, layers = shape.width, shape.depth
    kernels = layers * 12 * d * d + 256 * d  # 4 d^2 of attention and 8 d^2 of MLP; the head
    channels = layers * (4 * d + 4 * d + d) + 256  # q, k, v, out; up; down; the head
    tables, rows = (256 + shape.context) * d, 256 + shape.context  # of bytes and of positions
    rest = channels + (2 * layers + 1) * 2 * d  # biases, norms
    model = mp.wrap(demo("byte_lm_models").ByteLM(shape), demo("byte_lm_runs").INT8)
    tokens = jax.ShapeDtypeStruct((1, shape.context), "int32")
    weights = jax.eval_shape(model.init, jax.random.key(0), tokens)
    int8 = jax.eval_shape(lambda weights: mp.quantize(model, weights, tokens), weights)
    before = 4 * (kernels + tables + rest)
    after = kernels + 4 * channels + tables + 4 * rows + 4 * rest
    assert abstract_bytes(weights) == before
    assert abstract_bytes(int8) == after
    assert after / before <= 0.29


def abstract_bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def result_of(report, **rows):
    """A Result with the given (bits per byte, weight bytes, step seconds, tokens per second)."""
    result = report.Result(entropy=4.5, zlib=2.0)
    for name, (bits, size, step, speed) in rows.items():
        row = report.Row(bits_per_byte=bits, weight_bytes=size, forward_bytes=speed)
        row.step_times, row.forward_times = [step] if step else [], [1.0]
        result.rows[getattr(report, name)] = row
    return result


def test_a_line_says_what_is_slower_and_none_says_what_is_not(demo):
    report = demo("byte_lm_report")
    result = result_of(
        report, FLOAT32=(2, 100, 1.0, 90), BFLOAT16=(2, 100, 1.5, 180), INT8=(2, 28, None, 60)
    )
    assert report.remarks(result) == [
        "mixed_bfloat16 trains 1.50 times slower than float32 on this machine.",
        "int8 (from mixed_bfloat16) infers 1.50 times slower than float32 on this machine.",
    ]


@pytest.mark.parametrize(
    ("bits", "int8_bytes", "reached"),
    [
        ((2.5, 2.52, 2.54), 28, [True, True, True, True]),
        ((3.1, 3.1, 3.1), 31, [False, True, True, False]),
        ((2.5, 2.55, 2.6), 28, [True, False, False, True]),
        ((2.5, float("nan"), 2.5), 28, [True, False, False, True]),
    ],
)
def test_targets_can_be_missed(demo, bits, int8_bytes, reached):
    report = demo("byte_lm_report")
    result = result_of(
        report,
        FLOAT32=(bits[0], 100, 1.0, 90),
        BFLOAT16=(bits[1], 100, 1.0, 90),
        INT8=(bits[2], int8_bytes, None, 90),
    )
    assert [ok for _, ok in report.targets(result)] == reached


def environment() -> dict[str, str]:
    """That of a user on one CPU device, with this checkout importable."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "png"), [([], "byte_lm.png"), (["--nnx"], "byte_lm_nnx.png")])
def test_the_demo_runs_prints_every_row_and_draws_the_curves(tmp_path, flags, png):
    result = subprocess.run(
        [sys.executable, str(DEMO), "--quick", *flags],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    figures = {
        name: next(line for line in lines if line.strip().startswith(name)).count("x ")
        for name in ("float32", "mixed_bfloat16", "int8 (from mixed_bfloat16)")
    }
    # An "x " ends a ratio: of bits, bytes, step and speed; int8 does not train.
    assert figures == {"float32": 4, "mixed_bfloat16": 4, "int8 (from mixed_bfloat16)": 3}
    for name in ("zlib, level 9", "order-0 entropy"):
        assert any(line.strip().startswith(name) for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == [png]
    assert (tmp_path / png).read_bytes().startswith(b"\x89PNG")


class Pipe(io.StringIO):
    """What a reader at the other end of a pipe has by now."""

    seen = ""

    def flush(self):
        self.seen = self.getvalue()


def test_a_pipe_is_told_each_tenth_when_it_is_reached(demo):
    console, shown = pytest.importorskip("rich.console"), demo("shown_progress")
    pipe, lines = Pipe(), []
    with shown.ShownProgress(console.Console(file=pipe, width=100)) as progress:
        task = progress.add_task("compiling the [step]", total=40)
        for step in range(40):
            progress.update(task, advance=1, description=f"training, loss {step}")
            lines.append(len(pipe.seen.splitlines()))
        other = progress.add_task("evaluating", total=1)
        progress.update(other, advance=1)
    assert lines == [1 + (step + 1) // 4 for step in range(40)]
    told = [line.split(" s  ")[1].strip() for line in pipe.seen.splitlines()]
    assert told[:3] == [
        "0%  compiling the [step]",
        "10%  training, loss 3",
        "20%  training, loss 7",
    ]
    assert told[10:] == ["100%  training, loss 39", "0%  evaluating", "100%  evaluating"]


def test_a_terminal_gets_bars_and_no_lines(demo):
    console, shown = pytest.importorskip("rich.console"), demo("shown_progress")
    pipe = Pipe()
    with shown.ShownProgress(console.Console(file=pipe, force_terminal=True, width=100)) as bars:
        bars.update(bars.add_task("training", total=2), advance=1)
    assert "\u2501" in pipe.seen and " 50%" not in pipe.seen


@pytest.mark.slow
def test_an_interrupted_demo_prints_what_it_has_and_no_traceback(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(DEMO), "--quick", "--steps", "100000"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(25)  # the imports and the compilation, several times over
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()  # where it heard no signal
    assert process.returncode == 130 and "Traceback" not in err, err
    assert "Interrupted: this is what was measured so far." in out
    assert "mixed_bfloat16" in out and [path.name for path in tmp_path.iterdir()] == ["byte_lm.png"]


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_missing_package_names_the_extra(tmp_path, package):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules['{package}'] = None\n")
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    result = subprocess.run(
        [sys.executable, str(DEMO), "--quick"],
        env=environment() | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr == (
        f'the demo needs `{package}`, which is not installed: pip install "mpjax[demo]"\n'
    )
