"""A page in the browser: what is in its folder, what is refused, and that Chromium answers as Python does."""

import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, browser, serving
from exporting_cases import small
from helpers import difference, refused_in_one_line
from PIL import ExifTags, Image, ImageCms

import vit
from vit.cli.export import as_text
from vit.exporting import page_graph, to_web, web_runtime
from vit.exporting.runtimes import OnnxRuntime

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
BAR = 5e-4  # a pixel may be a grey level off; the random model changes by 1e-2 from size to size
CACHED = all((web_runtime.cache_folder() / name).is_file() for name in web_runtime.SHA256)
in_browser = pytest.mark.skipif(
    not (CHROMIUM and CACHED),
    reason=f"needs Chromium, and {web_runtime.PACKAGE} in the cache, into which an export for the web fetches it",
)


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """A picture of odd sides."""
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    rough = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(rough).resize((53, 37), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """A folder with files in place of ONNX Runtime Web's, which are known by their hashes."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    for name in web_runtime.SHA256:
        (folder / name).write_text(f"in place of {name}")
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in web_runtime.SHA256}
    monkeypatch.setattr(web_runtime, "SHA256", hashes)
    return folder


def expected(model, file, size):
    with Image.open(file) as picture, torch.no_grad():
        return to_web.reference(model, picture, size)


def metadata_of(model):
    page = {"size": None, "batch": 1, "input": "page", "precision": "float32"}
    rest = {"source": None, "versions": {}, "processor": "", "parity": None, "categories": None, "outputs": ()}
    return vit.exporting.Metadata(config=model.config, preprocessing=model.preprocessing, **page, **rest)


# ---- the folder


@pytest.mark.slow
def test_the_folder_is_complete(runtime, tmp_path):
    model, site = small(), tmp_path / "site"
    report = vit.export(model, site, format="web", runtime_folder=runtime)
    assert {file.name for file in site.iterdir()} == to_web.FILES == {Path(name).name for name in report.files}
    assert report.files[0] == str(site / "index.html")
    size = (site / "model.onnx").stat().st_size / 1e6
    assert f"to load faster: --int8 --force makes the model, {size:.1f} MB" in as_text(report)
    assert report.bytes == sum(file.stat().st_size for file in site.iterdir())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    facts = json.loads((site / "model.json").read_text())
    assert facts["bytes"] == (site / "model.onnx").stat().st_size
    assert facts["grids"][facts["own"]] == [7, 5] and facts["categories"] == model.categories and not facts["draw"]
    assert "Permission is hereby granted" in (site / to_web.LICENCE).read_text()
    assert str(tmp_path) not in "".join((site / name).read_text() for name in ("model.json", "index.html"))
    rows = report.metadata.parity
    assert {row["input"] for row in rows} == {f"2 pictures at {s}" for s in ("28 x 20", "16 x 8", "56 x 40")}
    assert {row["output"] for row in rows} == {"logits", "attention"}
    with pytest.raises(ValueError, match="the graph of a page"):
        vit.load_exported(site / "model.onnx")
    with pytest.raises(FileExistsError, match="exists: force=True"):
        vit.export(model, site, format="web", runtime_folder=runtime)
    to_web.check_folder(site, force=True)
    with to_web.building(site) as folder:
        (folder / "new").touch()
    assert [file.name for file in site.iterdir()] == ["new"]
    with pytest.raises(FileExistsError, match=r"site holds new, which vit export did not write: give another folder"):
        vit.export(model, site, format="web", runtime_folder=runtime, force=True)
    with pytest.raises(OSError), to_web.building(site) as folder:
        raise OSError("the disk is full")
    assert [file.name for file in site.iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("settings", "prepared"),
    [
        pytest.param({}, {"crop_pct": 0.8}, marks=pytest.mark.slow),
        pytest.param({"in_chans": 1, "num_classes": 0}, {"crop_pct": 0.8}, marks=pytest.mark.slow),
        ({"global_pool": "avg", "depth": 1}, {"mode": "squash", "size": (20, 20)}),
        ({"depth": 1}, {"crop_pct": 0.9, "size": (36, 40)}),  # a step of it would be square
        ({"depth": 1}, {"crop_pct": 0.6, "size": (48, 48)}),  # 36 / 0.6 is 60, and 59 in float32
    ],
    ids=str,
)
def test_the_graph_is_the_model_at_all_steps_of_the_slider(settings, prepared, picture, tmp_path):
    model = small(**settings)
    model.preprocessing = replace(model.preprocessing, **prepared).with_channels(model.config.in_chans)
    graph = page_graph.convert(model, metadata_of(model))
    (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
    session = OnnxRuntime(tmp_path / "model.onnx", 1)
    with Image.open(picture) as image:  # to sides for which timm's two ways of rounding differ
        image.resize((61, 41)).save(picture := tmp_path / "picture.png")
    answers = []
    for rows, columns in to_web.grids(model):
        wanted = expected(model, picture, (4 * rows, 4 * columns))
        with Image.open(picture) as image:
            found = to_web.run(session, image, (rows, columns), to_web.cover_of(model, (rows, columns)))
        assert tuple(found) == page_graph.output_names(model)
        for name, value in found.items():
            assert value.shape == wanted[name].shape
            assert difference(value, wanted[name]) <= (1 / 255 if name == "pixels" else BAR), (name, rows, columns)
        answers.append(found["features" if "features" in found else "logits"])
    assert difference(answers[0], answers[-1]) > 5 * BAR  # the control: the size matters


def test_the_example_is_upright_and_tells_nothing_else(tmp_path):
    picture = Image.new("RGB", (3000, 60), "red")
    picture.paste("blue", (0, 0, 1500, 60))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.ImageDescription] = 6, "my street"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture.save(tmp_path / "photo.jpg", exif=exif, icc_profile=profile)
    to_web.example_for(small(), tmp_path / "photo.jpg").save(tmp_path / "example.png")
    with Image.open(tmp_path / "example.png") as found:
        assert found.size == (20, 1024) and not found.info and not found.getexif()
        assert found.getpixel((10, 100))[2] > 200 > 50 > found.getpixel((10, 900))[2]  # blue above
    assert to_web.example_for(small(), None).size != to_web.example_for(small(), picture).size == (1024, 20)


def test_an_example_that_cannot_be_read_ends_the_export_at_once(tmp_path):
    refused_in_one_line(
        lambda: vit.export(small(), tmp_path / "site", "web", example=tmp_path / "no.jpg"), "cannot use image .*no.jpg"
    )
    with pytest.raises(ValueError, match=r"--example .* with onnx: that is the picture that a page opens with"):
        vit.export(small(), tmp_path / "model.onnx", example=tmp_path / "no.jpg")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_wrong_graph_is_not_written(runtime, tmp_path, monkeypatch):
    real = page_graph.PageGraph.forward

    def shifted(self, images, grid, cover):
        return real(self, images.flip(2), grid, cover)  # left and right swapped, which a symmetric picture would hide

    monkeypatch.setattr(page_graph.PageGraph, "forward", shifted)
    with pytest.raises(
        vit.exporting.ParityError, match="on 2 pictures at 16 x 8 the page's pixels differ from Pillow's by"
    ):
        vit.export(small(), tmp_path / "site", format="web", runtime_folder=runtime)
    assert not (tmp_path / "site").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runtime"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"half": True}, r"--half \(half=True\) with web: .* formats that take it: onnx"),
        ({"outputs": ["logits"]}, "takes one picture at a time, of any size, and shows all that it can: leave out"),
        ({"batch_size": 2}, "leave out dynamic, batch_size, outputs and input"),
        ({"input": "image"}, "leave out dynamic, batch_size, outputs and input"),
        ({"dynamic": False}, "leave out dynamic, batch_size, outputs and input"),
        ({"opset": 18}, "that is a number of ONNX's"),
    ],
)
def test_options_of_other_formats_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        vit.export(small(), tmp_path / "site", format="web", **options)
    assert not list(tmp_path.iterdir())


def test_a_runtime_folder_is_for_a_page(tmp_path):
    with pytest.raises(ValueError, match=r"runtime_folder=.* with onnx: that is for a page's ONNX Runtime Web"):
        vit.export(small(), tmp_path / "model.onnx", runtime_folder=tmp_path)


def test_models_that_a_page_cannot_show(tmp_path):
    model = small(in_chans=4)
    model.preprocessing = model.preprocessing.with_channels(4)
    with pytest.raises(ValueError, match="a page shows pictures of 1 or 3 channels, and the model takes 4"):
        vit.export(model, tmp_path / "site", format="web")
    model = small()
    model.preprocessing = replace(model.preprocessing, interpolation="box")
    with pytest.raises(ValueError, match="resizes by bilinear, bicubic, lanczos, and .* asks for 'box'"):
        vit.export(model, tmp_path / "site", format="web")


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "site").write_text("mine")
    with pytest.raises(ValueError, match="site is a file: expected the name of a folder"):
        vit.export(small(), tmp_path / "site", format="web", force=True)
    assert (tmp_path / "site").read_text() == "mine"


# ---- ONNX Runtime Web


def test_the_runtime_is_known_by_its_hash(runtime, tmp_path):
    inside = tmp_path / "unpacked" / "package" / "dist"
    inside.mkdir(parents=True)
    for file in runtime.iterdir():
        shutil.copy(file, inside)
    assert web_runtime.runtime_files(tmp_path / "unpacked") == [inside / name for name in web_runtime.SHA256]
    (inside / web_runtime.MODULE).write_text("another")
    with pytest.raises(ValueError, match=r"ort.wasm.bundle.min.mjs is not that of ONNX Runtime Web 1.30.0"):
        web_runtime.runtime_files(tmp_path / "unpacked")
    with pytest.raises(ValueError, match=r"does not hold ort-wasm-simd-threaded.wasm .* --runtime-folder"):
        web_runtime.runtime_files(tmp_path)


def test_without_npm_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"npm, which fetches it, is missing: run `npm pack onnxruntime-web@1.30.0`"):
        vit.export(small(), tmp_path / "site", format="web")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", [False, True])
def test_npm_fills_the_cache_once(fails, runtime, tmp_path, monkeypatch, capsys):
    package = tmp_path / "package" / "dist"
    package.mkdir(parents=True)
    for file in runtime.iterdir():
        shutil.copy(file, package)
    archive = tmp_path / "onnxruntime-web-1.30.0.tgz"
    subprocess.run(["tar", "czf", archive, "package"], cwd=tmp_path, check=True)
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho no such host >&2; exit 1\n" if fails else f"#!/bin/sh\n/bin/cp {archive} .\n")
    npm.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(npm.parent))
    if fails:
        with pytest.raises(ValueError, match=r"npm cannot fetch onnxruntime-web@1.30.0 \(no such host\): run"):
            web_runtime.runtime_files()
        assert not list((tmp_path / "cache" / "vit-small").iterdir())
        return
    found = web_runtime.runtime_files()
    assert [file.read_text() for file in found] == [f"in place of {file.name}" for file in found]
    assert "fetching onnxruntime-web@1.30.0" in capsys.readouterr().err
    npm.unlink()
    assert web_runtime.runtime_files() == found  # from the cache
    assert capsys.readouterr().err == ""


# ---- in Chromium


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """The pages of a model with a head and of one without, and the models."""
    if not (CHROMIUM and CACHED):
        pytest.skip("no Chromium or no ONNX Runtime Web")
    found = {}
    for name, settings in (("head", {}), ("none", {"num_classes": 0})):
        found[name] = small(depth=1, **settings), tmp_path_factory.mktemp(name) / "site"
        vit.export(*found[name], format="web")
    return found


def choose_file(page, path):
    """Give the page a file, as its button does."""
    handle = page.call("Runtime.evaluate", expression="document.getElementById('file')")["result"]["objectId"]
    page.call("DOM.setFileInputFiles", files=[str(path)], objectId=handle)


def move(page, step):
    """Move the slider to a step, and wait for the answer."""
    page.evaluate(
        f"{{ const s = document.getElementById('size'); s.value = {step}; s.dispatchEvent(new Event('input')); }}"
    )
    page.wait(f"!document.body.classList.contains('busy') && document.querySelector('.now').dataset.size == {step}")


def outputs(page):
    """The page's last outputs."""
    found = page.evaluate(
        "Object.fromEntries(Object.entries(answer).map(([k, v]) => [k, {data: Array.from(v.data), dims: v.dims}]))"
    )
    return {name: torch.tensor(one["data"]).view(one["dims"]) for name, one in found.items()}


def answered(page, text):
    """Wait until a picture, described by its shape, was answered."""
    page.wait(
        f"document.getElementById('picture-shape').textContent.includes({text!r})"
        " && !document.body.classList.contains('busy') && document.querySelector('.now') !== null"
    )


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize("which", ["head", "none"])
def test_chromium_answers_as_python_does(which, sites, picture):
    model, site = sites[which]
    with serving(site) as url, browser() as page:
        page.open(url, "ready")
        assert "cosine of 1.00000" in page.evaluate("document.getElementById('proof').textContent")
        choose_file(page, picture)
        answered(page, "picture 37 x 53 x 3")
        seen = []
        for step, (rows, columns) in enumerate(to_web.grids(model)):
            if step not in (0, 4, 7):
                continue
            move(page, step)
            seen.append(outputs(page))
            wanted = expected(model, picture, (4 * rows, 4 * columns))
            assert tuple(seen[-1]) == page_graph.output_names(model)
            for name, value in seen[-1].items():
                bar = 1 / 255 if name == "pixels" else BAR
                assert difference(value.float(), wanted[name]) <= bar, (name, rows, columns)
        name = "logits" if which == "head" else "features"
        assert difference(seen[0][name], seen[1][name]) > 10 * BAR  # the control
        labels = page.evaluate("document.getElementById('labels').innerText")
        if which == "head":
            shares = seen[-1]["logits"].softmax(1)[0]
            assert labels.split("\n")[0] == model.categories[shares.argmax()]
            assert abs(float(re.findall(r"([\d.]+)\s%", labels)[0]) - 100 * shares.max()) < 1
        else:
            assert labels.startswith("row ") and "cosine" in labels
            before = page.evaluate("document.getElementById('near').getAttribute('aria-label')")
            page.evaluate("document.getElementById('near').focus()")
            page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
            after = page.evaluate("document.getElementById('near').getAttribute('aria-label')")
            assert before != after and "row 7, column 6" in after
        assert page.problems() == []
        assert all(one.startswith((url, f"blob:{url}")) for one in page.requests())


@in_browser
@pytest.mark.slow
def test_the_page_speaks_to_no_other_host(sites):
    with serving(sites["head"][1]) as url, serving(sites["none"][1]) as other, browser() as page:
        page.open(url, "ready")
        assert page.evaluate(f"fetch('{other}').then(() => 'came', () => 'refused')") == "refused"
        assert page.evaluate("fetch('model.json').then(() => 'came', () => 'refused')") == "came"  # the control
        code = f"fetch('{other}').then(() => postMessage('came'), () => postMessage('refused'))"
        script = f"new Worker(URL.createObjectURL(new Blob([`{code}`])))"  # as the page makes its own
        assert page.evaluate(f"new Promise((done) => {script}.onmessage = (e) => done(e.data))") == "refused"
        image = f"Object.assign(new Image(), {{src: '{other}example.png'}}).decode()"
        assert page.evaluate(f"{image}.then(() => 'came', () => 'refused')") == "refused"


@in_browser
@pytest.mark.slow
def test_what_cannot_be_shown_is_said_in_one_line(sites, tmp_path, picture):
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:40])
    status = "document.getElementById('status').textContent"
    with serving(sites["head"][1]) as url, browser("--use-fake-ui-for-media-stream") as page:
        page.open(url, "ready")
        choose_file(page, tmp_path / "broken.png")
        page.wait(f"{status}.includes('cannot read broken.png: try a PNG or JPEG file')")
        choose_file(page, picture)
        answered(page, "picture 37 x 53 x 3")
        assert page.evaluate(status) == ""
        page.evaluate("document.getElementById('camera').click()")
        page.wait(f"{status} === 'No camera was found that is free.'")
    with serving(sites["head"][1]) as url, browser() as page:
        page.call("Page.addScriptToEvaluateOnNewDocument", source="delete globalThis.WebAssembly")
        page.open(url, "failed")
        assert page.evaluate(status).startswith("This browser has no WebAssembly")


@in_browser
@pytest.mark.slow
def test_a_folder_that_was_not_copied_whole(sites, tmp_path):
    shutil.copytree(sites["head"][1], tmp_path / "site")
    (tmp_path / "site" / "model.onnx").write_bytes(b"short")
    with serving(tmp_path / "site") as url, browser() as page:
        page.open(url, "failed")
        text = page.evaluate("document.getElementById('status').textContent")
        assert re.search(r"model.onnx has not \d+ bytes: copy the whole folder again", text), text


@in_browser
@pytest.mark.slow
def test_the_camera(sites):
    flags = "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"
    with serving(sites["head"][1]) as url, browser(*flags) as page:
        page.open(url, "ready")
        before = outputs(page)["logits"]
        page.evaluate("document.getElementById('camera').click()")
        page.wait("document.getElementById('camera').getAttribute('aria-pressed') === 'true'")
        page.wait("document.getElementById('picture-shape').textContent.includes('picture 480 x 640 x 3')")
        page.evaluate("document.getElementById('camera').click()")
        answered(page, "picture 480 x 640 x 3")
        assert page.evaluate("document.getElementById('camera').getAttribute('aria-pressed')") == "false"
        assert not torch.equal(before, outputs(page)["logits"])
        assert page.problems() == []


@in_browser
@pytest.mark.slow
def test_everything_has_a_name_and_fits(sites):
    with serving(sites["head"][1]) as url, browser() as page:
        page.open(url, "ready")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        named = [(one["role"]["value"], one.get("name", {}).get("value")) for one in nodes if not one["ignored"]]
        roles = {"button", "slider", "image", "heading", "table", "region"}
        assert {role for role, _ in named if role in roles} == roles
        assert [role for role, name in named if role in roles - {"table"} and not name] == []
        assert ("slider", "Resolution:") in named
        spoken = page.evaluate("document.getElementById('size').getAttribute('aria-valuetext')")
        assert spoken == "28 x 20 pixels, as exported"
        for width in (390, 1280):
            page.look(width)
            assert page.evaluate("document.documentElement.scrollWidth") == width
        colours = []
        for dark in (False, True):
            page.look(390, dark=dark)
            colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert colours[0] != colours[1]


@in_browser
@pytest.mark.slow
def test_a_drawn_digit_in_int8(tmp_path):
    model = vit.load_pretrained("vit_digits_patch4_32")
    report = vit.export(model, tmp_path / "site", format="web", int8=True)
    assert "to load faster" not in as_text(report)
    assert report.metadata.precision == "int8" and (tmp_path / "site" / "model.onnx").stat().st_size < 1_000_000
    with serving(tmp_path / "site") as url, browser() as page:
        page.look(1280, 1600)
        page.open(url, "ready")
        proof = page.evaluate("document.getElementById('proof').textContent")
        assert float(re.search(r"cosine of ([\d.]+)", proof)[1]) >= 0.998
        box = page.evaluate(
            "(({x, y, width}) => [x, y, width])(document.getElementById('pad').getBoundingClientRect())"
        )

        def at(x, y):
            return {"x": box[0] + x * box[2], "y": box[1] + y * box[2], "button": "left", "buttons": 1}

        path = [(0.3, 0.2), (0.5, 0.2), (0.7, 0.2), (0.6, 0.4), (0.5, 0.6), (0.4, 0.85)]  # a seven
        page.call("Input.dispatchMouseEvent", type="mousePressed", clickCount=1, **at(*path[0]))
        for point in path[1:]:
            page.call("Input.dispatchMouseEvent", type="mouseMoved", **at(*point))
        page.call("Input.dispatchMouseEvent", type="mouseReleased", **at(*path[-1]))
        answered(page, "picture 8 x 8 x 3: the drawing")
        assert page.evaluate("document.getElementById('labels').innerText").split("\n")[0] == "7"
        assert page.problems() == []
