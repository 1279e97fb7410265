"""Answers in other tools' forms, read back with those tools: supervision, pycocotools, PDF readers, a browser."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

supervision = pytest.importorskip("supervision", reason="pip install -e '.[supervision]'")
pytest.importorskip("pikepdf", reason="pip install -e '.[forms]'")
pytest.importorskip("pypdfium2", reason="pip install -e '.[pdf]'")

from florence_onnx import Florence2, GenerationOptions, InputError, tasks  # noqa: E402
from florence_onnx.batch.answering import Loading, Question  # noqa: E402
from florence_onnx.batch.job import Job, run  # noqa: E402
from florence_onnx.batch.outputs import read_rows  # noqa: E402
from florence_onnx.batch.rows import NAMES, Row  # noqa: E402
from florence_onnx.commands.main import app  # noqa: E402
from florence_onnx.forms import boxes, label_studio, labelled, pages, searchable_pdf  # noqa: E402
from florence_onnx.forms.labelled import LabelledImage, Shape, classify, file_name, of_rows  # noqa: E402
from florence_onnx.forms.writing import FORMS, Writing, write  # noqa: E402

SAMPLES = sorted((Path(tasks.__file__).parent / "demo" / "samples").glob("*.png"))
HOSTILE = '</script><script>document.title="run"</script> & "quotes" \'x\' =1+1 ]]> \x00\x07'


def shape(
    label: str, *points: tuple[float, float], kind: Any = "box", score: float | None = None, text: str = ""
) -> Shape:
    return Shape(label, kind, points, score, text)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of four tasks about the samples and a damaged image."""
    folder = tmp_path_factory.mktemp("rows")
    for path in SAMPLES:
        shutil.copy(path, folder)
    (folder / "damaged.png").write_bytes(b"no image")
    asked = (tasks.OBJECT_DETECTION, tasks.OCR_WITH_REGION, tasks.CAPTION, tasks.REFERRING_EXPRESSION_SEGMENTATION)
    options = GenerationOptions(num_beams=1, scores=True)
    question = Question(asked, "the largest shape", None, options)
    loading = Loading("demo", {"device": "cpu", "session_options": {"intra_op_num_threads": 1}})
    out = folder / "rows.jsonl"
    run(Job((str(folder),), out, question, loading, workers=1))
    return out


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledImage]:
    """Images with all that is awkward: quads, outlines, boxes without an area, none at all, names and labels of strangers."""
    folder = tmp_path_factory.mktemp("drawn")
    shapes = {
        "boxes.png": (
            shape("cat", (10.25, 20.5), (110.75, 90.0), score=0.9),
            shape("a dog: big", (0, 0), (200, 100), score=0.25),
        ),
        "flat.png": (shape("cat", (50, 60), (50, 60)), shape("cat", (10, 10), (10, 90))),
        "none.png": (),
        "outline.png": (
            shape("cat", (10, 10), (190, 10), (100, 90), kind="polygon", score=0.5),
            shape("kite", (0, 0), (199, 0), (199, 99), (0, 99), kind="polygon"),
        ),
        "déjà vu & co.png": (shape(HOSTILE, (1, 2), (30, 40)),),
    }
    found = []
    for name, each in shapes.items():
        Image.new("RGB", (200, 100), (90, 120, 150)).save(folder / name)
        found.append(LabelledImage(str(folder / name), file_name(name), 200, 100, "object-detection", "demo", each))
    return found


# ---------------------------------------------------------------------------------------------------- names and classes


def test_names_lead_nowhere_else_and_differ() -> None:
    assert [
        file_name(name)
        for name in ("a/b.jpg", "../../etc/passwd", "..", "", "x\\y.png", "s.tar#7.jpg", "v.mp4#t=1.500")
    ] == [
        *("b.jpg", "passwd", "image", "image", "y.png", "s.tar-7.jpg", "v.mp4-t=1.500"),
    ]
    assert file_name('a<b>:"|?*\n.png') == "a_b_.png" and len(file_name("x" * 500 + ".png")) == 120
    row = dict.fromkeys(NAMES) | {"task": "caption", "width": 1, "height": 1, "truncated": False, "model": ""}
    sources = ["a/car.jpg", "b/car.jpg", "c/CAR.jpg", "d/car-2.jpg", "../car.jpg", "e/car", "f/car"]
    names = [each.name for each in of_rows(Row(**{**row, "id": source, "source": source}) for source in sources)]  # type: ignore[arg-type]
    assert len({name.casefold() for name in names}) == len(sources)
    assert names[:2] == ["car.jpg", "car-2.jpg"] and not any("/" in name or ".." in name for name in names)


def test_classes_of_the_answers_of_a_list_and_of_a_map(drawn: list[LabelledImage]) -> None:
    _, found, others = classify(drawn)
    assert found.names == tuple(sorted({HOSTILE, "a dog: big", "cat", "kite"})) and not others
    kept, found, others = classify(drawn, ["kite", "animal"], {" CAT": "animal", "a  dog: big": "animal"}, "drop")
    assert found.names == ("kite", "animal") and others == {HOSTILE: 1}
    assert [each.label for image in kept for each in image.shapes] == ["animal"] * 5 + ["kite"]
    _, found, others = classify(drawn, ["kite"], unmapped="keep")
    assert found.names[0] == "kite" and len(found.names) == 4 and sum(others.values()) == 6
    with pytest.raises(InputError, match="no class"):
        classify(drawn, ["kite"], unmapped="error")
    kept, _, _ = classify(drawn, min_score=0.5)
    assert [each.score for image in kept for each in image.shapes] == [0.9, None, None, 0.5, None, None]
    for wrong in ("cat", "=x", "x="):
        with pytest.raises(InputError, match="LABEL=CLASS"):
            labelled.read_mapping([wrong])


def test_rows_of_several_tasks_need_a_choice(rows: Path) -> None:
    with pytest.raises(InputError, match="choose one with --task"):
        list(of_rows(read_rows(rows)))
    with pytest.raises(InputError, match="no rows of ocr, only of caption"):
        list(of_rows(read_rows(rows), "ocr"))
    found = list(of_rows(read_rows(rows), "ocr-with-region"))
    assert len(found) == 9 and [image.error is not None for image in found].count(True) == 1
    assert all(each.kind == "quad" and each.label == "text" and each.text for image in found for each in image.shapes)
    outlines = list(of_rows(read_rows(rows), "referring-expression-segmentation"))
    assert any(each.kind == "polygon" for image in outlines for each in image.shapes)


# -------------------------------------------------------------------------------------------------------------- readers


def save(form: str, images: list[LabelledImage], out: Path, **more: Any) -> Path:
    kept, classes, _ = classify(images)
    write(form, kept, classes, Writing(out, **more))
    return out


def only_boxes(images: list[LabelledImage]) -> list[LabelledImage]:
    """Supervision's readers draw masks of all shapes where there is an outline, so it gets boxes alone."""
    return [replace(image, shapes=tuple(each for each in image.shapes if each.kind == "box")) for image in images]


@pytest.mark.parametrize("form", ["coco", "yolo", "voc"])
def test_supervision_reads_the_same_boxes(drawn: list[LabelledImage], tmp_path: Path, form: str) -> None:
    images = [image for image in only_boxes(drawn) if image.name != "déjà vu & co.png" and image.name != "flat.png"]
    folder = Path(images[0].source).parent
    if form == "coco":
        out = save(form, [replace(image, source=Path(image.source).name) for image in images], tmp_path / "coco.json")
        data = supervision.DetectionDataset.from_coco(str(folder), str(out))
    elif form == "yolo":
        only = tmp_path / "images"
        only.mkdir()
        for image in images:
            shutil.copy(image.source, only)
        out = save(form, images, tmp_path / "yolo")
        data = supervision.DetectionDataset.from_yolo(str(only), str(out / "labels"), str(out / "data.yaml"))
    else:
        only = tmp_path / "images"
        only.mkdir()
        for image in images:
            shutil.copy(image.source, only)
        out = save(form, images, tmp_path / "voc")
        data = supervision.DetectionDataset.from_pascal_voc(str(only), str(out))
    found = {Path(path).name: detections for path, _, detections in data}
    for image in images:
        detections = found[image.name]
        expected = [each.bounds for each in image.shapes]
        assert len(detections) == len(expected)
        if expected:
            order = np.argsort(detections.xyxy[:, 0])
            wanted = np.array(sorted(expected))
            np.testing.assert_allclose(detections.xyxy[order], wanted, atol=0.5)
            names = [data.classes[number] for number in detections.class_id[order]]
            assert names == [each.label for each in sorted(image.shapes, key=lambda each: each.bounds)]


def test_pycocotools_reads_boxes_scores_and_run_lengths(drawn: list[LabelledImage], tmp_path: Path) -> None:
    pytest.importorskip("pycocotools", reason="pip install -e '.[evaluate]'")
    from pycocotools.coco import COCO

    plain = COCO(str(save("coco", drawn, tmp_path / "points.json")))
    packed = COCO(str(save("coco", drawn, tmp_path / "packed.json", rle=True)))
    assert [len(plain.getAnnIds(imgIds=[number])) for number in (1, 2, 3, 4, 5)] == [2, 2, 0, 2, 1]
    triangle = plain.loadAnns(plain.getAnnIds(imgIds=[4]))[0]
    assert triangle["bbox"] == [10, 10, 180, 80] and triangle["area"] == 7200 and triangle["score"] == 0.5
    masks = [data.annToMask(data.loadAnns(data.getAnnIds(imgIds=[4]))[0]) for data in (plain, packed)]
    assert masks[0].shape == (100, 200) and (masks[0] == masks[1]).all() and abs(int(masks[0].sum()) - 7200) < 250
    scored = [each for each in plain.dataset["annotations"] if "score" in each]
    results = plain.loadRes(
        [{key: each[key] for key in ("image_id", "category_id", "bbox", "score")} for each in scored]
    )
    assert len(results.getAnnIds()) == 3


def test_yolo_s_names_are_yaml(drawn: list[LabelledImage], tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    out = save("yolo", drawn, tmp_path / "yolo")
    names = yaml.safe_load((out / "data.yaml").read_text(encoding="utf-8"))["names"]
    assert names == sorted({HOSTILE, "a dog: big", "cat", "kite"})
    assert sorted(path.name for path in (out / "labels").iterdir()) == sorted(f"{image.stem}.txt" for image in drawn)
    lines = (out / "labels" / "outline.txt").read_text().splitlines()
    assert [len(line.split()) for line in lines] == [7, 9]
    assert (
        save("yolo", drawn[2:3], tmp_path / "empty") and "names: []" in (tmp_path / "empty" / "data.yaml").read_text()
    )


def test_labelme_createml_and_fiftyone(drawn: list[LabelledImage], tmp_path: Path) -> None:
    first = json.loads((save("labelme", drawn, tmp_path / "labelme") / "boxes.json").read_text())
    assert [each["shape_type"] for each in first["shapes"]] == ["rectangle", "rectangle"] and first[
        "imageHeight"
    ] == 100
    assert first["shapes"][0]["points"] == [[10.25, 20.5], [110.75, 90.0]] and first["shapes"][0]["score"] == 0.9
    only = tmp_path / "one"
    only.mkdir()
    shutil.copy(drawn[0].source, only)
    save("labelme", [replace(drawn[0], source="boxes.png")], tmp_path / "one-labels")
    ((_, _, detections),) = supervision.DetectionDataset.from_labelme(str(only), str(tmp_path / "one-labels"))
    np.testing.assert_allclose(np.sort(detections.xyxy[:, 0]), [0, 10.25], atol=0.5)
    (annotation, _) = json.loads(save("createml", drawn, tmp_path / "createml.json").read_text())[0]["annotations"]
    assert annotation["coordinates"] == {"x": 60.5, "y": 55.25, "width": 100.5, "height": 69.5}
    labels = json.loads(save("fiftyone", drawn, tmp_path / "labels.json").read_text())
    assert labels["labels"]["boxes"][0]["bounding_box"] == pytest.approx([0.05125, 0.205, 0.5025, 0.695])
    assert labels["labels"]["none"] == [] and labels["classes"] == sorted({HOSTILE, "a dog: big", "cat", "kite"})


def test_label_studio_s_tasks(drawn: list[LabelledImage], rows: Path, tmp_path: Path) -> None:
    out = save("label-studio", drawn, tmp_path / "tasks.json", url_prefix="/data/local-files/?d=")
    found = json.loads(out.read_text())
    assert (
        len(found) == 5
        and "%20" in found[4]["data"]["image"]
        and found[0]["data"]["image"].startswith("/data/local-files/?d=")
    )
    box = found[0]["predictions"][0]["result"][0]
    assert box["value"] == {
        "x": 5.125,
        "y": 20.5,
        "width": 50.25,
        "height": 69.5,
        "rotation": 0,
        "rectanglelabels": ["cat"],
    }
    assert (box["original_width"], box["original_height"], box["type"]) == (200, 100, "rectanglelabels")
    ids = [each["id"] for task in found for each in task["predictions"][0]["result"]]
    assert len(set(ids)) == len(ids) and found == json.loads(
        save("label-studio", drawn, out, url_prefix="/data/local-files/?d=").read_text()
    )
    configuration = ElementTree.fromstring(out.with_suffix(".xml").read_text().replace("\x00", "").replace("\x07", ""))
    tags = {tag.get("name"): tag for tag in configuration}
    for task in found:
        for each in task["predictions"][0]["result"]:
            assert each["from_name"] in tags and each["to_name"] == "image"
    lines = label_studio.tasks(of_rows(read_rows(rows), "ocr-with-region"))
    outline, text = lines[0]["predictions"][0]["result"]
    assert (
        outline["id"] == text["id"]
        and text["value"]["text"] == ["ROCKET"]
        and outline["value"]["polygonlabels"] == ["text"]
    )
    captions = label_studio.tasks(of_rows(read_rows(rows), "caption"))
    assert captions[0]["predictions"][0]["result"][0]["value"]["text"] and len(captions) == 8, "errors are no tasks"


# ------------------------------------------------------------------------------------------------------------ documents


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> LabelledImage:
    """A page with lines in several scripts, one of them turned."""
    path = tmp_path_factory.mktemp("sheet") / "sheet.jpg"
    Image.new("RGB", (800, 600), "white").save(path, quality=80)
    turned = ((100.0, 500.0), (300.0, 300.0), (320.0, 320.0), (120.0, 520.0))
    lines = (
        shape(
            "text", (40, 40), (340, 40), (340, 80), (40, 80), kind="quad", score=0.87, text="Invoice number 4711 & more"
        ),
        shape("text", (40, 120), (340, 120), (340, 160), (40, 160), kind="quad", text="Grüße, Привет, 漢字"),
        shape("text", *turned, kind="quad", score=0.5, text="turned <line>"),
    )
    return LabelledImage(str(path), "sheet.jpg", 800, 600, "ocr-with-region", "demo", lines)


def test_pdf_readers_find_the_text_where_it_is(sheet: LabelledImage, rows: Path, tmp_path: Path) -> None:
    import pypdfium2

    out = tmp_path / "sheet.pdf"
    assert searchable_pdf.write([sheet], out, dpi=100) == []
    with pypdfium2.PdfDocument(out) as document:
        (page,) = document
        assert page.get_size() == pytest.approx((576, 432))
        text = page.get_textpage()
        for line in sheet.shapes:
            found = text.search(line.text).get_next()
            assert found is not None, line.text
        start, count = text.search("Invoice number 4711").get_next()
        rectangles = [text.get_rect(number) for number in range(text.count_rects(start, count))]
        left, bottom, right, top = rectangles[0][0], rectangles[0][1], rectangles[-1][2], rectangles[0][3]
        share = len("Invoice number 4711") / len(sheet.shapes[0].text)
        assert left == pytest.approx(40 * 0.72, abs=2) and right == pytest.approx((40 + 300 * share) * 0.72, abs=6)
        assert 432 - 80 * 0.72 - 8 < bottom < top < 432 - 40 * 0.72 + 8
        pixels = np.asarray(page.render(scale=1).to_pil().convert("L"))
        assert pixels.min() > 240, "no text is drawn"
    if shutil.which("pdftotext"):
        said = subprocess.run(["pdftotext", str(out), "-"], capture_output=True, text=True, check=True).stdout
        assert "Invoice number 4711 & more" in said and "Привет" in said and "漢字" in said
    assert b"DCTDecode" in out.read_bytes(), "the JPEG file goes in as it is"
    images = list(of_rows(read_rows(rows), "ocr-with-region"))
    missing = searchable_pdf.write(images, tmp_path / "all.pdf")
    with pypdfium2.PdfDocument(tmp_path / "all.pdf") as document:
        assert len(document) == 8 and len(missing) == 1
        words = [image.shapes[0].text for image in images if image.shapes]
        pages_text = [page.get_textpage().get_text_range() for page in document]
        assert all(any(word in text for text in pages_text) for word in words) and len(words) == 5
    with pytest.raises(InputError, match="--images"):
        searchable_pdf.write([replace(sheet, source="nowhere.png")], tmp_path / "none.pdf")


def test_hocr_alto_and_page(sheet: LabelledImage, drawn: list[LabelledImage]) -> None:
    hocr = ElementTree.fromstring(pages.hocr([sheet, *drawn]))
    space = {"x": "http://www.w3.org/1999/xhtml"}
    found = hocr.findall(".//x:div[@class='ocr_page']", space)
    assert len(found) == 6 and "bbox 0 0 800 600" in found[0].attrib["title"]
    lines = found[0].findall("x:span[@class='ocr_line']", space)
    assert [line.text for line in lines] == [each.text for each in sheet.shapes]
    assert lines[0].attrib["title"] == "bbox 40 40 340 80; x_wconf 87" and "wconf" not in lines[1].attrib["title"]
    alto = ElementTree.fromstring(pages.alto(sheet))
    strings = alto.findall(f".//{{{pages.ALTO}}}String")
    assert [string.attrib["CONTENT"] for string in strings][:5] == ["Invoice", "number", "4711", "&", "more"]
    lefts = [float(string.attrib["HPOS"]) for string in strings[:5]]
    assert (
        lefts == sorted(lefts)
        and lefts[0] == 40
        and float(strings[4].attrib["HPOS"]) + float(strings[4].attrib["WIDTH"]) == pytest.approx(340)
    )
    assert strings[0].attrib["WC"] == "0.8700"
    page = ElementTree.fromstring(pages.page_xml(sheet))
    assert [each.text for each in page.iter(f"{{{pages.PAGE}}}Unicode")] == [each.text for each in sheet.shapes]
    assert page.find(f".//{{{pages.PAGE}}}Coords").attrib["points"] == "40,40 340,40 340,80 40,80"  # type: ignore[union-attr]
    for image in drawn:
        (
            ElementTree.fromstring(boxes.voc(image)),
            ElementTree.fromstring(pages.alto(image)),
            ElementTree.fromstring(pages.page_xml(image)),
        )
    captions = replace(sheet, shapes=(), text="one\ntwo")
    assert [line.text for line in pages.lines_of(captions)] == ["one", "two"]


def test_csv_runs_no_formula(drawn: list[LabelledImage]) -> None:
    bad = replace(drawn[2], text="=HYPERLINK(1)", shapes=())
    error = replace(drawn[2], error="+cmd", text="")
    found = list(csv.DictReader(io.StringIO(boxes.table([*drawn, bad, error]))))
    assert len(found) == 10
    assert found[-2]["text"] == "'=HYPERLINK(1)" and found[-1]["error"] == "'+cmd"
    assert found[0]["xmin"] == "10.25" and found[0]["score"] == "0.900000"


# -------------------------------------------------------------------------------------------------------------- gallery


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1200, "height": 800})
        browser.close()


def test_the_gallery_shows_and_filters(page: Any, drawn: list[LabelledImage], tmp_path: Path) -> None:
    error = LabelledImage("gone.png", "gone.png", 0, 0, "object-detection", "demo", error="it <b>is</b> damaged")
    out = save("html", [*drawn, error], tmp_path / "gallery.html", thumbnails=True)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(out.as_uri())
    assert page.title() == "Answers of Florence-2", "no label was run as a script"
    assert page.locator("figure").count() == 6 and page.locator("svg polygon").count() == 7
    assert page.locator("#count").text_content() == "6 of 6 images, 7 shapes, 1 errors"
    assert page.locator(".error").text_content() == "it <b>is</b> damaged"
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    page.fill("#label", "CAT")
    assert page.locator("figure").count() == 3 and page.locator("svg polygon").count() == 4
    page.fill("#label", "")
    page.locator("#score").evaluate("slider => { slider.value = 0.6; slider.dispatchEvent(new Event('input')); }")
    assert page.locator("svg polygon").count() == 5, "shapes without a score stay"
    page.locator("#score").evaluate("slider => { slider.value = 0; slider.dispatchEvent(new Event('input')); }")
    page.select_option("#state", "errors")
    assert page.locator("figure").count() == 1
    page.select_option("#state", "empty")
    assert page.locator("figure .name").first.text_content().startswith(drawn[2].source)
    page.select_option("#state", "")
    page.fill("#search", "déjà")
    assert page.locator("figure").count() == 1
    assert all(url.startswith("file:") for url in requests)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_gallery_of_a_thousand_images_shows_sixty_at_once(
    page: Any, drawn: list[LabelledImage], tmp_path: Path
) -> None:
    many = [replace(drawn[0], name=f"{number}.png", text=f"number {number}") for number in range(1000)]
    page.goto(save("html", many, tmp_path / "gallery.html").as_uri())
    assert page.locator("figure").count() == 60
    page.click("#more")
    assert page.locator("figure").count() == 120


# ---------------------------------------------------------------------------------------------------------- the command


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_from_the_command_line(rows: Path, tmp_path: Path, form: str) -> None:
    task = "ocr-with-region" if form in ("hocr", "alto", "page", "pdf") else "object-detection"
    out = tmp_path / "out"
    found = call(rows, "--to", form, "--out", out, "--task", task)
    assert found.exit_code == 0, found.stderr
    assert "8 images" in found.stderr and "1 rows have an error" in " ".join(found.stderr.split())
    files = [path for path in ([out] if out.is_file() else out.rglob("*")) if path.is_file()]
    assert all(path.stat().st_size for path in files if "labels" not in path.parts) and len(files) >= 1
    if form in ("voc", "labelme", "alto", "page"):
        assert len(files) == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "xml"], "form must be one of"),
        (["--to", "coco", "--unmapped", "forget"], "drop, keep or error"),
        (["--to", "coco", "--classes", "cat,cat"], "each once"),
        (["--to", "coco", "--classes", "circle", "--unmapped", "error"], "labels that are no class"),
        (["--to", "coco", "--map", "x"], "LABEL=CLASS"),
        (["--to", "coco", "--task", "caption-to-phrase-grounding"], "there are no rows of"),
    ],
)
def test_wrong_arguments(rows: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    task = [] if "--task" in arguments else ["--task", "object-detection"]
    found = call(rows, "--out", tmp_path / "out", *arguments, *task)
    assert found.exit_code == 2 and said in " ".join(found.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
    (tmp_path / "none.jsonl").write_text("[1]\n")
    assert call(tmp_path / "none.jsonl", "--to", "coco", "--out", tmp_path / "out").exit_code == 2
    assert call(tmp_path / "nowhere", "--to", "coco", "--out", tmp_path / "out").exit_code == 2


def test_predictions_have_the_forms_themselves() -> None:
    model = Florence2.from_pretrained("demo", device="cpu")
    answer = model.run("<OD>", SAMPLES[0], options=GenerationOptions(num_beams=1, scores=True))
    annotations = answer.to_coco(image_id=7, categories=["yellow star"])
    assert [each["category_id"] for each in annotations] == [2, 3, 1] and {
        each["image_id"] for each in annotations
    } == {7}
    box = answer.results.bboxes[0]
    assert (
        annotations[0]["bbox"] == pytest.approx([box.x, box.y, box.w, box.h]) and annotations[0]["score"] == box.score
    )
    assert len(answer.to_labelme("a.png")["shapes"]) == 3 and answer.to_labelme("a.png")["imagePath"] == "a.png"
    task = answer.to_label_studio("http://x/a.png")
    assert task["data"] == {"image": "http://x/a.png"} and len(task["predictions"][0]["result"]) == 3
