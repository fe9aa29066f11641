"""Protects: the report shows what was run, says what is missing, escapes every text, and works in a real browser."""

import csv
import json
import os
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
from browser import chromium, wait
from conftest import noise, script

from vlmclassifier.records import UserError
from vlmclassifier.reporting.findings import word_of

EVIL = 'a <img src=x onerror="alert(1)" & "rose"'  # without an end: class lists refuse whole tags


def write_report(outputs, **options):
    module = script("scripts/report.py")
    module.main(module.Args(outputs=outputs, **options))
    folder = options.get("out") or outputs / "report"
    return (folder / "index.html").read_text(), (folder / "examples.js").read_text()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, tiny):
    """Runs of a miniature VLM and CLIP on four images of two classes, one of which is called like a script."""
    folder = tmp_path_factory.mktemp("report")
    names = ["a cat", EVIL]
    (folder / "classes.json").write_text(json.dumps(names))
    rows = []
    for number in range(8):
        path = f"{'<b>' if number == 1 else ''}{number}.png"
        noise((40, 30), number).save(folder / path)
        rows.append({"image": path, "label": names[number % 2], "split": "train" if number > 3 else "test"})
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"benchmark": str(folder / "mine.jsonl"), "classes": folder / "classes.json"}
    root = folder / "outputs"
    for name, model, more in (
        ("main_results/classify_vlm.py", "llava-1.5-7b", {"candidates": ("all", "none"), "max_new_tokens": 3}),
        ("main_results/classify_clip.py", "clip-vit-l-336", {"save_scores": True}),
        ("inference_analysis/rank_labels.py", "llava-1.5-7b", {}),
    ):
        module = script(name)
        out = root / name.split("/")[0] / model / "x"
        module.main(module.Args(model, tiny / model, out=out.parent, **common, **more))
    return root


def test_the_page_shows_every_run_and_the_tables(outputs, capsys):
    page, data = write_report(outputs, data_root=outputs.parent, title="Mine & yours")
    printed = capsys.readouterr().out
    assert "index.html (" in printed and "4 examples" in printed
    assert "<title>Mine &amp; yours</title>" in page and page.count('class="verdict') == 0
    assert (
        "The small study judges findings" in page
        and "Table 1" in page
        and "LLaVA1.5-7B (miniature, 3 tokens)" in page
        and "rows of the paper" in page
    )
    with open(outputs / "main_results" / "table1.csv", newline="") as stream:
        row = next(row for row in csv.DictReader(stream) if row["value"] and row["metric"] == "accuracy")
    assert f"{float(row['value']):.1f} [{float(row['low']):.1f}, {float(row['high']):.1f}] n=4" in page
    (found,) = json.loads(data.removeprefix("window.EXAMPLES = ").rstrip(";\n"))
    assert [run["kind"] for run in found["runs"]] == ["vlm", "vlm", "ranking", "clip"]
    ranking = json.loads((outputs / "inference_analysis" / "llava-1.5-7b" / "predictions.jsonl").read_text()
                         .splitlines()[0])  # fmt: skip
    place = found["ids"].index(ranking["example_id"])
    best = [name for name, _ in found["runs"][2]["top"][place]]
    assert best[0] == ranking["ranking"][0] and found["runs"][2]["calibrated"] == "not calibrated"
    assert sum(percent for _, percent in found["runs"][2]["top"][place]) == pytest.approx(100, abs=0.2)
    assert found["runs"][3]["right"] == [
        int(answer == found["names"][label])
        for answer, label in zip(found["runs"][3]["answers"], found["labels"], strict=True)
    ]
    folder = outputs / "report"
    for link in re.findall(r'(?:src|href)="([^"#]+)"', page):
        assert link.startswith("data:") or (folder / unescape(link)).exists(), link
    assert not re.search(r"https?://", page.replace("http://www.w3.org", ""))  # offline


def test_texts_are_escaped(outputs):
    page, data = write_report(outputs, data_root=outputs.parent)
    assert EVIL not in page and "a &lt;img src=x onerror=" in page
    assert "<img" not in data and "<b>" not in data and "\\u003cb>1.png" in data


def test_missing_images_are_said(outputs, tmp_path):
    page, data = write_report(outputs, data_root=tmp_path, out=tmp_path / "page", tables=False)
    assert "4 of 4 images of mine are not shown" in page and '"thumbnails":["","","",""]' in data
    page, _ = write_report(outputs, data_root=outputs.parent, out=tmp_path / "page", tables=False, examples=2)
    assert "mine: the first 2 of 4 examples are in the browser" in page
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="notes holds something else: choose another --out"):
        write_report(outputs, out=tmp_path / "notes", tables=False)


def test_outputs_that_are_empty_half_finished_or_corrupt(tmp_path, outputs, capsys):
    with pytest.raises(UserError, match="does not exist: run a section first"):
        write_report(tmp_path / "none")
    (tmp_path / "seed-3").mkdir()
    page, data = write_report(tmp_path)
    assert "has no folder of a section. Its studies are in seed-3" in capsys.readouterr().err
    assert "Written by main_results/mini_study.py." in page and data == "window.EXAMPLES = [];\n"
    assert "Main results (section 2): nothing was run yet; main_results/README.md says how" in page

    folder = tmp_path / "main_results"
    source = outputs / "main_results" / "clip-vit-l-336"
    for name in ("half", "torn", "foreign", "cut"):
        (folder / name).mkdir(parents=True)
        for file in source.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    record = json.loads((source / "run.json").read_text())
    (folder / "half" / "run.json").write_text(json.dumps(record | {"finished": None, "rows": 1}))
    (folder / "torn" / "run.json").write_text('{"format": 2, "conf')
    (folder / "foreign" / "run.json").write_text('{"format": 2, "config": {"kind": "clip"}}')
    (folder / "cut" / "values.safetensors").write_bytes(b"x")
    (folder / "findings.csv").write_text("finding,metric\nF1,x\n")
    (folder / "table1.csv").write_bytes(b"")
    page, data = write_report(tmp_path, tables=False)
    page = unescape(page)
    assert [run["top"] for run in json.loads(data[18:-2])[0]["runs"]] == [None]  # its answers are shown
    for text in ("half is unfinished (1 of 4 rows): repeat its command", "torn/run.json cannot be read",
                 "foreign/run.json cannot be read", "findings.csv is not a table of findings",
                 "table1.csv cannot be read (it is empty)"):  # fmt: skip
        assert text in page, text
    assert "The probabilities of cut are not shown: " in page and "values.safetensors" in page


def copy_run(outputs, source, to, **config):
    """A copy of a run with another configuration."""
    shutil.copytree(outputs / source, to)
    record = json.loads((to / "run.json").read_text())
    changes = {key: config.pop(key) for key in ("rows", "target") if key in config}
    record["config"] |= config
    (to / "run.json").write_text(json.dumps(record | changes))


def test_other_kinds_keep_their_places_and_what_is_left_out_is_said(outputs, tmp_path):
    """Many answers in words do not push out CLIP and rankings; the full run counts, and the one with scores."""
    for number in range(12):
        copy_run(outputs, "main_results/llava-1.5-7b-open_world", tmp_path / "main_results" / f"v{number:02}",
                 model=f"model-{number}")  # fmt: skip
    copy_run(outputs, "main_results/clip-vit-l-336", tmp_path / "main_results" / "clip-scores")
    copy_run(outputs, "main_results/clip-vit-l-336", tmp_path / "main_results" / "a-clip", scores=False)
    copy_run(outputs, "main_results/clip-vit-l-336", tmp_path / "main_results" / "a-part", rows=2, target=2)
    copy_run(outputs, "inference_analysis/llava-1.5-7b", tmp_path / "inference_analysis" / "ranking")
    page, data = write_report(tmp_path, data_root=outputs.parent, tables=False)
    (found,) = json.loads(data[18:-2])
    kinds = [run["kind"] for run in found["runs"]]
    assert kinds.count("clip") == kinds.count("ranking") == 1 and kinds.count("vlm") == 10
    assert found["runs"][kinds.index("clip")]["top"] and len(found["ids"]) == 4
    assert "Not among the examples, which show 12 runs and one of each model" in page
    assert "a-clip" in page and "a-part" in page


def test_probabilities_use_the_temperature_of_these_very_numbers(outputs, tmp_path, monkeypatch):
    """A row of another run of the same name is not taken; the deepest name that is certain enough is shown."""
    from vlmclassifier.reporting import examples
    from vlmclassifier.scoring.calibration import read_name_scores
    from vlmclassifier.scoring.hierarchy import make_hierarchy

    run = tmp_path / "main_results" / "clip"
    copy_run(outputs, "main_results/clip-vit-l-336", run)
    file = tmp_path / "inference_analysis" / "calibration" / "calibration.csv"
    file.parent.mkdir(parents=True)
    tree = make_hierarchy(["a cat", EVIL], {"a cat": "a cat", EVIL: "b"}, {"a cat": ["t"], "b": ["t"], "t": []},
                          {"t": "any of both"})  # fmt: skip
    monkeypatch.setattr(examples, "hierarchy_of", lambda benchmark, names: tree)
    for key, words in (("another", "not calibrated"), (read_name_scores(run).rows_hash, "calibrated, T = 2.50")):
        file.write_text(f"run,rows_hash,temperature\nmain_results/clip,{key},2.5\n")
        _, data = write_report(tmp_path, data_root=outputs.parent, tables=False)
        (shown,) = json.loads(data[18:-2])[0]["runs"]
        assert shown["calibrated"] == words
    assert set(shown["ancestors"]) == {"any of both, 100%"}  # two names of a random model: neither is 90% certain
    file.write_text("run\nx\n")
    page, _ = write_report(tmp_path, data_root=outputs.parent, tables=False)
    assert "calibration.csv cannot be read: run inference_analysis/calibrate.py again" in unescape(page)


def test_torn_tables_and_records_become_notes(outputs, tmp_path):
    copy_run(outputs, "main_results/clip-vit-l-336", tmp_path / "main_results" / "clip")
    lines = (outputs / "main_results" / "table1.csv").read_text().splitlines()
    (tmp_path / "main_results" / "table1.csv").write_text("\n".join([*lines[:3], lines[3][: len(lines[3]) // 3]]))
    record = json.loads((tmp_path / "main_results" / "clip" / "run.json").read_text())
    del record["config"]["manifest"]
    (tmp_path / "main_results" / "other").mkdir()
    (tmp_path / "main_results" / "other" / "run.json").write_text(json.dumps(record))
    page = unescape(write_report(tmp_path, tables=False)[0])
    assert "table1.csv cannot be read" in page and "other/run.json lacks what the examples need" in page
    (tmp_path / "data_analysis" / "x").mkdir(parents=True)
    (tmp_path / "data_analysis" / "x" / "correlations.csv").write_text("model,tags\na,\n")
    page = unescape(write_report(tmp_path, out=tmp_path / "new")[0])
    assert "data_analysis/table.py: error: " in page and "older than this page" in page


def test_findings_of_released_models_come_from_their_tables(tmp_path):
    """Intervals that do not overlap hold; rows with other tags are not compared; a study's own verdicts go before."""
    from vlmclassifier.reporting.findings import of_released_models

    header = "model,setting,dataset,tags,metric,value,low,high,n,paper,difference,inside"
    rows = ["CLIP-L,closed_world,flowers,,accuracy,76,75,77,6149,,,", "A,open_world,flowers,,accuracy,6,5,7,6149,,,",
            "A,closed_world,flowers,40 tokens,accuracy,75,74,76,6149,,,",
            "B,open_world,cars,miniature,accuracy,9,8,9,9,,,",
            "CLIP-L,closed_world,cars,,accuracy,80,79,81,9,,,"]  # fmt: skip
    folder = tmp_path / "main_results"
    folder.mkdir()
    (folder / "table1.csv").write_text("\n".join([header, *rows]) + "\n")
    (found,) = of_released_models(tmp_path)
    assert (found["finding"], found["value"], found["holds"]) == ("F1", 1.0, "does not hold") and found["n"] == 6149
    (folder / "table1.csv").write_text("\n".join([header, *rows[:2]]) + "\n")
    assert of_released_models(tmp_path)[0]["holds"] == "holds"
    (tmp_path / "feature_analysis").mkdir()
    probe = "A,last_token-held_out,flowers,,accuracy,70,69,71,6149,,,"
    (tmp_path / "feature_analysis" / "table3.csv").write_text(f"{header}\n{probe}\n")
    assert [(row["finding"], row["value"]) for row in of_released_models(tmp_path)] == [("F1", 70.0), ("F3", 64.0)]
    page, _ = write_report(tmp_path, tables=False)
    assert page.count('class="verdict holds"') == 2 and page.count('class="verdict not-run"') == 4


@pytest.mark.parametrize(
    ("judged", "word"),
    [
        ([], "not run"), ([""], "reported"), (["holds", ""], "holds"), (["holds (by construction)"],
         "holds by construction"), (["holds (by construction)", "holds"], "holds"), (["does not hold, p = 0.5"],
         "does not hold"), (["holds", "does not hold"], "holds in part"), (["cannot be judged: x"], "cannot be judged"),
        (["holds, but below 5 points, p = 0.01"], "holds"),
    ],
)  # fmt: skip
def test_one_verdict_of_many_rows(judged, word):
    assert word_of(judged) == word


def test_the_page_in_a_browser(outputs):
    """Filters, search, pages of cards, images, the theme: in a real Chromium, from the file."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    write_report(outputs, data_root=outputs.parent)
    with chromium() as browser:
        browser.get(f"file://{(outputs / 'report' / 'index.html').resolve()}")
        count = browser.find_element(By.ID, "count")
        assert count.text == "4 of 4 examples" and len(browser.find_elements(By.CLASS_NAME, "example")) == 4
        browser.execute_script("document.getElementById('examples').scrollIntoView()")
        wait(browser, lambda b: all(b.execute_script("return arguments[0].naturalWidth", image) > 0
                                    for image in b.find_elements(By.CSS_SELECTOR, ".example img")))  # fmt: skip
        headings = {heading.text for heading in browser.find_elements(By.CSS_SELECTOR, ".example h3")}
        assert headings == {"a cat", EVIL}  # shown as text

        def right():
            return browser.execute_script("return window.EXAMPLES[0].runs[3].right")

        Select(browser.find_element(By.ID, "second-right")).select_by_visible_text("wrong")
        assert browser.find_element(By.ID, "second").get_attribute("value") == "3"  # CLIP
        assert count.text == f"{right().count(0)} of 4 examples"
        Select(browser.find_element(By.ID, "second-right")).select_by_visible_text("right")
        assert count.text == f"{right().count(1)} of 4 examples"
        Select(browser.find_element(By.ID, "second-right")).select_by_visible_text("any")
        browser.find_element(By.ID, "search").send_keys("0.png")
        wait(browser, lambda b: count.text == "1 of 4 examples")
        browser.find_element(By.CSS_SELECTOR, "#filters button[type=reset]").click()
        wait(browser, lambda b: count.text == "4 of 4 examples")
        browser.find_element(By.ID, "class").send_keys("A CAT")
        wait(browser, lambda b: count.text == "2 of 4 examples")
        before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        browser.find_element(By.ID, "theme").click()
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != before
        for image in browser.find_elements(By.TAG_NAME, "img"):
            assert image.get_attribute("alt")


@pytest.mark.slow
def test_ten_thousand_predictions_weigh_little(outputs, realdata, tmp_path):
    """Real photographs, each under many names; how fast the page opens is in scripts/bench/bench_report.py."""
    from vlmclassifier.runs import read_record

    photos = sorted((realdata / "images").rglob("*.jpg"))
    folder = tmp_path / "main_results" / "many"
    folder.mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    lines = []
    for number in range(10_000):
        photo = photos[number % len(photos)]
        os.link(photo, tmp_path / "photos" / f"{number}.jpg") if same_disk(photo, tmp_path) else (
            (tmp_path / "photos" / f"{number}.jpg").symlink_to(photo))  # fmt: skip
        row = {"example_id": f"{number}.jpg", "label": "a cat", "class_index": 0, "prompt": "", "choices": None,
               "output": "a cat", "ranking": [0]}  # fmt: skip
        lines.append(json.dumps(row) + "\n")
    (folder / "predictions.jsonl").write_text("".join(lines))
    record = read_record(outputs / "main_results" / "clip-vit-l-336")
    record["config"].pop("scores")
    (folder / "run.json").write_text(json.dumps(record | {"rows": 10_000, "target": 10_000}))
    (tmp_path / "paths.toml").write_text(f"[trusted_roots]\nphotos = '{realdata}'\n")
    os.environ["VLMCLASSIFIER_PATHS"] = str(tmp_path / "paths.toml")
    try:
        page, data = write_report(tmp_path, data_root=tmp_path / "photos", tables=False)
    finally:
        del os.environ["VLMCLASSIFIER_PATHS"]
    size = sum(file.stat().st_size for file in (tmp_path / "report").rglob("*") if file.is_file())
    assert size < 30e6 and "are not shown" not in page and data.count(".webp") == 10_000


def same_disk(one: Path, other: Path) -> bool:
    """Whether a hard link is possible."""
    return one.stat().st_dev == other.stat().st_dev
