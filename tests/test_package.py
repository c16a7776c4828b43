"""What is installed: one top-level name with everything in it, its version and types, and imports that stay light."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    copy = tmp_path_factory.mktemp("source") / "repository"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():  # of a copy, since building writes files beside the sources
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    command += ["--wheel-dir", str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_wheel_content(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vit"}
    for folder, package in (("vit", "vit"), ("weights", "vit/weights"), ("kernels", "vit/kernels")):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{file.relative_to(ROOT / folder)}" in names
    data = {f"vit/data/{file.relative_to(ROOT / 'vit' / 'data')}" for file in (ROOT / "vit/data").rglob("*.*")}
    data |= {f"vit/exporting/page/{file.name}" for file in (ROOT / "vit/exporting/page").iterdir()}
    assert data <= set(names) and {"vit/py.typed", "vit/kernels/gpu/tuned.json"} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    checkpoint = zipfile.ZipFile(wheel).getinfo("vit/data/vit_digits_patch4_32/model.safetensors")
    assert checkpoint.file_size <= 3_000_000


def test_an_installed_wheel_runs_outside_the_repository(wheel, tmp_path):
    """Unpacked on its own, without the repository on the path: all three packages, and the version, are the wheel's."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import vit, vit.weights, vit.kernels, sys; model = vit.load_pretrained('vit_digits_patch4_32');"
        "print(vit.weights.__file__); print(vit.kernels.__file__); print(model.config.num_classes, vit.__version__)"
    )
    start = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); "
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    weights, kernels, classes, found = done.stdout.split()
    assert weights.startswith(str(tmp_path)) and kernels.startswith(str(tmp_path)) and classes == "10"
    assert found == version()


def version() -> str:
    """The version that pyproject.toml states."""
    return re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]


def test_the_changelog_has_the_version():
    versions = re.findall(r"^## \[(\d.*)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == version()


def test_importing_the_folder_kernels_does_nothing():
    """transformers looks for a package `kernels`, and finds this folder when it runs in a checkout."""
    code = "import vit.kernels, kernels, sys; print([name for name in sys.modules if name.startswith('kernels')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "['kernels']", done.stderr


def test_a_missing_vit_weights_says_how_to_install_it():
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)];"
        f"sys.path.insert(0, {str(ROOT)!r}); import vit; vit.load_pretrained('x')"
    )
    done = subprocess.run([sys.executable, "-S", "-c", "import site; site.main(); " + code], capture_output=True,
                          text=True, cwd=ROOT)  # fmt: skip
    assert done.returncode == 1
    assert "vit.weights is not installed: run `pip install -e .`" in done.stderr


def test_loading_and_optimizing_do_not_import_pytorchs_compiler():
    """It takes two seconds to import."""
    code = "import sys, vit; vit.kernels.optimize(vit.load_pretrained('vit_digits_patch4_32'))"
    code += "; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_importing_vit_stays_light():
    code = "import sys, vit; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert "vit.model" in loaded
    for heavy in ("safetensors", "huggingface_hub", "timm", "torchvision", "vit.weights", "vit.kernels"):
        assert heavy not in loaded, heavy


def test_only_tests_and_examples_import_other_libraries_models():
    for folder in ("vit", "weights", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            others = r"^\s*(?:import|from) (timm|torchvision|transformers|sklearn|skimage)\b"
            assert not re.findall(others, file.read_text(), re.M), file


def test_arrows_run_one_way():
    """The model knows neither checkpoints nor kernels, except for five places that import them on first use."""
    may_look_up = {"vit/__init__.py", "vit/registry.py"}
    may_look_up |= {"vit/exporting/int8.py", "vit/exporting/to_transformersjs.py"}  # calibration; transformers' config
    for file in (ROOT / "vit").rglob("*.py"):
        name = file.relative_to(ROOT).as_posix()
        eager = re.findall(r"^(?:import|from) vit\.(?:weights|kernels)\b", file.read_text(), re.M)
        assert not eager, name
        lazy = re.findall(r"vit\.(?:weights|kernels)", re.sub(r'"""[\s\S]*?"""|#.*', "", file.read_text()))
        assert not lazy or name in may_look_up or name.startswith("vit/cli/"), name
    for file in (ROOT / "kernels").rglob("*.py"):
        assert "vit.weights" not in file.read_text()
    for file in (ROOT / "weights").rglob("*.py"):
        assert not re.findall(r"(?:import|from) vit\.kernels|import_module", file.read_text()), file


def test_the_package_is_imported_and_not_the_folder_of_its_tests():
    """With tests/ on sys.path, tests/vit would be found as `vit`."""
    import vit

    assert Path(vit.__file__).parents[1].name != "tests"
