"""The command `mpjax`, as a user calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import mpjax as mp
import mpjax_kernels as mk
from mpjax import _doctor
from mpjax._cli import main
from mpjax._cli_explain import program_of

ROOT = Path(__file__).parents[1]
PROGRAM = """
import jax, jax.numpy as jnp, flax.linen as nn
import mpjax as mp

def int8():
    model = mp.wrap(nn.Dense(64), "int8_from_float32")
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return model.apply, (jax.eval_shape(lambda v: mp.quantize(model, v, x), variables), x)

def floats():
    x = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    return jnp.matmul, (x, jax.ShapeDtypeStruct((64, 64), jnp.float32))

def wrong():
    return jnp.matmul

value = 3
"""


def run(*words, python=(), env=(), cwd=ROOT):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *python, "-m", "mpjax", *words],
        env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **dict(env)},
        capture_output=True,
        text=True,
        cwd=cwd,
    )


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "my_program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    yield "my_program"
    sys.modules.pop("my_program", None)


def rows_of(title):
    return next(rows for name, rows in _doctor.sections() if name.startswith(title))


def test_doctor_as_a_command():
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    for title, rows in _doctor.sections():
        assert title in done.stdout
        for row in rows[1:]:
            assert all(cell in done.stdout for cell in row[:1])
    assert f"jax               {jax.__version__}" in done.stdout
    assert mp.resolve_target("cpu").name in done.stdout


def test_doctor_needs_nothing_beside_the_base_install():
    """No module of an extra is imported: each would be an error here."""
    blocked = ("rich", "tqdm", "flatbuffers", "safetensors", "matplotlib", "libtpu")
    code = (
        "import sys, runpy\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"
        "sys.argv = ['mpjax', 'doctor']\n"
        "runpy.run_module('mpjax', run_name='__main__')"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Kernels" in done.stdout


def test_doctor_says_what_each_mode_becomes(monkeypatch):
    becomes = {row[0]: row[-1] for row in rows_of("Modes")[1:]}
    assert list(becomes) == [mode.name for mode in mp.modes()]
    here = mp.resolve_target("cpu")
    resolved = mp.get_policy("auto8_from_float32").resolve(here)
    expected = resolved.mode if here.eight_bits else "the source policy: nothing multiplies 8 bits"
    assert becomes["auto8"].startswith(expected)
    assert becomes["int4/128"] == "weights are decoded, products in the compute dtype"
    monkeypatch.setattr(_doctor, "resolve_target", lambda *_: mp.resolve_target("tpu7x"))
    becomes = {row[0]: row[-1] for row in rows_of("Modes")[1:]}
    assert becomes["auto8"] == "float8/row" and becomes["auto8_delayed"] == "float8"
    assert becomes["float8/row"] == "float8_e4m3fn x float8_e4m3fn, native"
    assert becomes["int8"] == "emulated: decoded, and multiplied in more bits"
    assert becomes["w4a8/128"] == becomes["int8"]
    monkeypatch.setattr(_doctor, "resolve_target", lambda *_: mp.resolve_target("v6e"))
    becomes = {row[0]: row[-1] for row in rows_of("Modes")[1:]}
    assert becomes["w4a8/128"] == "int4 is widened: int8 x int8, native"


@pytest.mark.parametrize("isa", [None, "avx512_bf16"])
def test_doctor_knows_what_native_kernels_multiply(monkeypatch, isa):
    monkeypatch.setattr(_doctor, "resolve_target", lambda *_: mp.resolve_target("cpu-avx512-bf16"))
    formats = ("int8", "float8_e4m3fn") if isa else ()
    monkeypatch.setattr(mk, "native_kernels", lambda: mk.NativeKernels(isa, None, formats))
    becomes = {row[0]: row[-1] for row in rows_of("Modes")[1:]}
    emulated = "emulated: decoded, and multiplied in more bits"
    native = f"native kernels decode in registers ({isa})"
    assert becomes["float8"] == becomes["float8/row"] == (native if isa else emulated)
    assert becomes["float8/128x128"] == emulated  # a scale varies along the contracting axis
    assert becomes["int8"] == "int8 x int8, native"


@pytest.mark.parametrize("refusal", [None, "tiles are read by AVX512-VNNI"])
def test_doctor_says_whether_prepacked_weights_are_read(monkeypatch, refusal):
    native = mk.NativeKernels("avx2", None, ("int8",), refusal)
    monkeypatch.setattr(mk, "native_kernels", lambda: native)
    rows = dict(rows_of("Kernels"))
    said = refusal or "int8 weights, by mp.quantize(..., prepack=True)"
    assert rows["prepacked weights"] == said


def test_doctor_on_hardware_that_is_not_in_the_table(monkeypatch):
    def unknown(*_):
        raise ValueError("the device at hand is 'Foo 9000', of which nothing is known")

    monkeypatch.setattr(_doctor, "resolve_target", unknown)
    assert "Foo 9000" in rows_of("Devices")[1][1]
    assert {row[-1] for row in rows_of("Modes")[1:]} == {
        "unknown hardware: give target= to mp.wrap"
    }


def test_doctor_says_why_there_are_no_native_kernels():
    done = run("doctor", env={"MPJAX_NATIVE": "0"}.items())
    assert "not used: the environment has MPJAX_NATIVE=0" in done.stdout


def test_what_was_noted_when_the_package_was_built(monkeypatch, tmp_path):
    about = sys.modules["mpjax_kernels._about"]
    monkeypatch.delenv("MPJAX_NATIVE", raising=False)
    monkeypatch.setattr(about, "_PATH", tmp_path / "absent.so")
    monkeypatch.setattr(about, "native_refusal", lambda _: "absent.so is not there")
    monkeypatch.setattr(about, "_BUILD_NOTE", tmp_path / "native_build.txt")
    assert str(mk.native_kernels().refusal).endswith("a checkout that was not installed")
    (tmp_path / "native_build.txt").write_text("none of the C++ compilers c++, g++ was found\n")
    why = "they were not compiled when the package was installed: none of the C++ compilers c++, "
    why += "g++ was found"
    assert mk.native_kernels() == mk.NativeKernels(None, why, tiles_refusal=why)


def test_the_kernels_of_a_platform_in_the_order_they_are_tried():
    assert mk.implementations("cuda") == ("gpu", "xla", "reference")
    assert mk.implementations("tpu") == ("tpu", "xla", "reference")
    on_cpus = mk.implementations("cpu")
    assert on_cpus[-3:] == ("cpu", "xla", "reference")
    assert ("native" in on_cpus) == (mk.native_kernels().isa is not None)


def test_extras_say_what_they_lack():
    rows = {row[0]: row for row in rows_of("Extras")[1:]}
    if "" in rows:
        pytest.skip("mpjax is not installed, so it has no extras")
    assert rows["export"][2] == "mpjax.export and load_exported"
    assert rows["dev"][1] == "installed" or rows["dev"][1].startswith("lacks ")


def test_targets():
    done = run("targets", "--sources")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()}
    assert {each.name for each in mp.targets()} <= lines.keys()
    assert "int8 1,836 Top/s" in done.stdout and "No integer products" in done.stdout


def test_explain_prints_what_the_compiler_made(program, capsys):
    assert main(["explain", f"{program}:int8", "--target", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (product,) = found["products"]
    assert (product["lhs"], product["rhs"]) == ("int8", "int8") and found["share_in_8_bits"] == 1
    function, arguments = program_of(f"{program}:int8")
    expected = mp.explain(function, *arguments, target="cpu")
    assert found["target"] == expected.target
    assert found["bytes_read"] == expected.bytes_read and found["flops"] == expected.flops
    assert main(["explain", f"{program}:floats", "--target", "cpu"]) == 0
    assert "float32 x float32" in capsys.readouterr().out
    assert main(["explain", f"{program}:floats", "--target", "cpu", "--min-flops", "0.9"]) == 1
    assert "0.0% of the operations are in 8 bits, less than 90.0%" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["3", "-0.1", "nan", "most"])
def test_explain_says_what_is_wrong_with_a_part(program, capsys, part):
    with pytest.raises(SystemExit, match="2"):
        main(["explain", f"{program}:int8", f"--min-flops={part}"])
    assert f"{part!r} is no number from 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_program", "'my_program' is not of the form module:function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("my_program:value", r"has no value()"),
        ("my_program:wrong", "should return the function to compile and the tuple of its arg"),
    ],
)
def test_explain_says_what_is_wrong_with_a_program(program, capsys, name, says):
    assert main(["explain", name, "--target", "cpu"]) == 2
    assert says in capsys.readouterr().err


def test_explain_of_an_unknown_target(program, capsys):
    assert main(["explain", f"{program}:floats", "--target", "v66"]) == 2
    assert "'v66', of which nothing is known" in capsys.readouterr().err


def test_no_command_is_an_error(capsys):
    assert main([]) == 2
    out = capsys.readouterr().out
    assert all(command in out for command in ("doctor", "targets", "explain"))
