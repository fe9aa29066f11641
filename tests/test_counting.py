"""Protects: class names are counted as a slow counter counts them, by both rules; broken files keep what was read."""

import csv
import gzip
import json
from collections import Counter

import pytest
from conftest import run_script, script

from vlmclassifier.benchmarks import BENCHMARKS, PAPER_BENCHMARKS, class_names
from vlmclassifier.counting import ClassMatcher, Form, PartialTextError, count_stage, name_tokens, read_texts, tokenise
from vlmclassifier.counting.matching import NAMED, reference_finds
from vlmclassifier.counting.tokens import joined
from vlmclassifier.records import UserError

LISTS = {key: class_names(BENCHMARKS[key]) for key in PAPER_BENCHMARKS}
ADVERSARIAL = [
    "Crane", "a crane.", "The whooping crane, a crane!", "crane crane crane", "whooping-crane cranes", "a colt's foot",
    "Colt's foot and colt's foot", "a great white shark and a tiger shark", "2012 Tesla Model S Sedan 2012 tesla",
    "a St. Bernard dog", "hard-leaved pocket orchid hard leaved pocket orchid", "Bird of paradise.", "",
    "  \n ", "日本語 crane 日本語", "CRANE\u00a0crane", "e\u0301clair éclair", "bishop of llandaff? Bishop of Llandaff",
    "(crane)", "\"crane\"", "crane's", "the cup , cup", "airplane air plane air-plane airplanes",
]  # fmt: skip


def slow_counts(texts, names, reference):
    """Sentences by class, by looking for every name in every sentence; the reference needs a token at both sides."""
    sentences = [" ".join(tokens) if reference else joined(tokens) for text in texts for tokens in tokenise(text)]
    spelled = {name: joined(name_tokens(name)) for name in names}
    counts = {name: sum(words in sentence for sentence in sentences) for name, words in spelled.items()}
    return {name: count for name, count in counts.items() if count}


def counted(matcher, texts, forms):
    sentences = [joined(tokens) for text in texts for tokens in tokenise(text)]
    counts = Counter()
    for _, number, mask in zip(*matcher.match(sentences), strict=True):
        if mask & forms:
            counts[matcher.classes[number]] += 1
    return counts


@pytest.mark.parametrize("key", PAPER_BENCHMARKS)
def test_counts_equal_a_slow_counter(key, realdata):
    """On captions and on sentences made to break it; the matcher has all class lists."""
    captions = json.loads(gzip.decompress((realdata / "text" / "captions_val2017.json.gz").read_bytes()))
    texts = [row["caption"] for row in captions["annotations"][:2000]] + ADVERSARIAL
    matcher = ClassMatcher(LISTS)
    for reference, forms in ((False, NAMED), (True, Form.REFERENCE)):
        expected = slow_counts(texts, LISTS[key], reference)
        found = counted(matcher, texts, forms)
        assert {name: n for (of, name), n in found.items() if of == key} == expected
        assert key == "cars" or expected


def forms_of(matcher, text):
    sentences = [joined(tokens) for tokens in tokenise(text)]
    return [(matcher.classes[number][1], Form(int(mask)) & ~Form.REFERENCE) for _, number, mask in
            zip(*matcher.match(sentences), strict=True)]  # fmt: skip


def test_every_form_of_a_name_is_told_apart():
    names = ["crane", "whooping crane", "air plane", "box", "boxes", "eft", "white shark", "great white shark"]
    matcher = ClassMatcher({"mine": names}, {"mine": [["derrick"], [], [], [], [], [], [], []]})
    cases = {
        "a whooping crane": {"crane": Form.INSIDE, "whooping crane": Form.ALONE},
        "a crane and a whooping crane": {"crane": Form.ALONE | Form.INSIDE, "whooping crane": Form.ALONE},
        "two cranes": {"crane": Form.PLURAL}, "a derrick": {"crane": Form.SYNONYM},
        "an airplane": {"air plane": Form.HYPHEN}, "an air-plane": {"air plane": Form.HYPHEN},
        "boxes": {"boxes": Form.ALONE},  # a class of that name has precedence over the plural
        "the left efts": {"eft": Form.PLURAL}, "a plane": {"air plane": Form.LAST_WORD},
        "great white shark": {"white shark": Form.INSIDE, "great white shark": Form.ALONE},
    }  # fmt: skip
    for text, expected in cases.items():
        found = {name: form & ~Form.LAST_WORD or form for name, form in forms_of(matcher, text)}
        assert {n: f for n, f in found.items() if f != Form.LAST_WORD or n in expected} == expected, text
    assert not reference_finds("colt's foot") and reference_finds("crane")
    with pytest.raises(UserError, match="The class list none is empty"):
        ClassMatcher({"none": []})


def conversations(count):
    rows = []
    for i in range(count):
        answer = f"A {'cat' if i % 3 else 'dog'}. It sleeps."
        turns = [{"from": "human", "value": f"<image>\nWhat is number {i}?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(i), "conversations": turns})
    return rows


def test_every_kind_of_file_is_read(tmp_path):
    from datasets import Dataset

    rows = conversations(4)
    (tmp_path / "llava.json").write_text(" \n" + json.dumps(rows))
    (tmp_path / "coco.json").write_text(
        json.dumps({"info": {}, "annotations": [{"caption": "A cat."}, {"caption": "Z"}]})
    )
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps({"text": f"line {i} é"}) for i in range(3)))
    (tmp_path / "plain.txt").write_text("one cat\n\ntwo dogs\n")
    (tmp_path / "qa.jsonl").write_text(json.dumps({"question": "who?", "output": "a cat", "more": 3}) + "\n")
    with gzip.open(tmp_path / "llava2.json.gz", "wt") as stream:
        json.dump(rows, stream)
    Dataset.from_dict({"caption": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    turns = [turn["value"] for row in rows for turn in row["conversations"]]
    assert list(read_texts(tmp_path / "llava.json")) == turns == list(read_texts(tmp_path / "llava2.json.gz"))
    assert list(read_texts(tmp_path / "coco.json")) == ["A cat.", "Z"]
    assert list(read_texts(tmp_path / "rows.jsonl")) == ["line 0 é", "line 1 é", "line 2 é"]
    assert list(read_texts(tmp_path / "plain.txt")) == ["one cat", "two dogs"]
    assert list(read_texts(tmp_path / "qa.jsonl", ["question", "output"])) == ["who?", "a cat"]
    assert list(read_texts(tmp_path / "saved")) == ["a", "b"]
    with pytest.raises(UserError, match="qa.jsonl line 1 has none of image"):
        (tmp_path / "qa.jsonl").write_text(json.dumps({"more": 3}) + "\n")
        list(read_texts(tmp_path / "qa.jsonl", ["image"]))
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(UserError, match="empty.json has no rows"):
        list(read_texts(tmp_path / "empty.json"))


def test_a_file_that_breaks_says_where_and_keeps_what_was_read(tmp_path):
    whole = json.dumps(conversations(50))
    cases = {"cut.json": (whole[:3000].encode(), "breaks behind row [0-9]+, before byte 3000"),
             "latin.jsonl": (b'{"text": "a cat"}\n{"text": "caf\xe9"}\n', r"line 2 is not UTF-8 \(byte 31\)"),
             "bad.jsonl": (b'{"text": "a cat"}\n{"text": \n', "line 2 is no JSON .* at byte"),
             "cut.txt.gz": (gzip.compress(b"a cat\n" * 9999)[:-9], "truncated or no gzip")}  # fmt: skip
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        read = []
        with pytest.raises(PartialTextError, match=message):
            for text in read_texts(tmp_path / name):
                read.append(text)
        assert read and all("cat" in text or "dog" in text or "?" in text for text in read), name
    counts = count_stage(ClassMatcher({"mine": ["cat"]}), tmp_path / "cut.json", tmp_path / "cache")
    assert counts.partial and counts.count(0, NAMED) > 3
    damaged = bytearray(gzip.compress(b"a cat\n" * 9999))
    damaged[10] = 0xFF  # the head of the first block
    (tmp_path / "damaged.txt.gz").write_bytes(damaged)
    with pytest.raises(PartialTextError, match="truncated or no gzip file .*invalid block type"):
        list(read_texts(tmp_path / "damaged.txt.gz"))


def test_half_a_surrogate_pair_is_counted_around(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a cat \\ud83d here"}\n')
    (tmp_path / "a.json").write_text('[{"text": "a cat \\ud83d here"}]')
    for name in ("a.jsonl", "a.json"):
        assert list(read_texts(tmp_path / name)) == ["a cat ? here"]
        counts = count_stage(ClassMatcher({"mine": ["cat"]}), tmp_path / name, tmp_path / "cache")
        assert counts.count(0, NAMED) == 1


def test_counts_do_not_depend_on_processes_or_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmclassifier.counting.stage.CHUNK", 200)
    file = tmp_path / "llava.json"
    file.write_text(json.dumps(conversations(60)))
    matcher = ClassMatcher({"mine": ["cat", "dog", "yak"], "other": ["cat"]})
    one = count_stage(matcher, file, tmp_path / "one")
    two = count_stage(matcher, file, tmp_path / "two", processes=2)
    (folder,) = (tmp_path / "one").iterdir()
    assert len(list(folder.glob("*.txt"))) > 5
    again = count_stage(matcher, file, tmp_path / "one", processes=2)
    assert one == two == again and one.texts == 120 and one.sentences == 180
    assert one.count(0, NAMED) == 40 and one.count(1, NAMED) == 20 and one.count(2, NAMED) == 0
    assert one.examples[0][0] == "a cat ." and len(one.examples[0]) == 5
    for chunk in sorted(folder.glob("*.txt"))[3:]:
        chunk.unlink()
    (folder / "texts.json").unlink()  # as after a kill
    assert count_stage(matcher, file, tmp_path / "one") == one


def run(tmp_path, **options):
    module = script("data_analysis/count_classes.py")
    module.main(module.Args(out=tmp_path / "out", processes=1, **options))
    tables = {}
    for table in ("", "-zero", "-examples"):
        with open(tmp_path / "out" / f"mine{table}.csv", newline="") as stream:
            tables[table] = list(csv.DictReader(stream))
    return tables


def test_the_script_writes_counts_examples_and_an_audit(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(conversations(9)))
    (tmp_path / "b.txt").write_text("The zebras and one sea lion.\nA lion\n")
    (tmp_path / "mine.jsonl").write_text('{"image": "a.png", "label": "cat", "split": "test"}\n')
    (tmp_path / "mine.json").write_text('["cat", "dog", "zebra", "sea lion", "lion", "polar bear", "colt\'s foot"]')
    options = {"texts": (f"a={tmp_path / 'a.json'}", f"b={tmp_path / 'b.txt'}"), "classes": tmp_path / "mine.json",
               "benchmarks": (str(tmp_path / "mine.jsonl"),)}  # fmt: skip
    tables = run(tmp_path, **options)
    counts = {(row["class"], row["stage"]): int(row["count"]) for row in tables[""]}
    assert [counts["cat", stage] for stage in ("a", "b", "total")] == [6, 0, 6]
    assert counts["zebra", "total"] == 0 and counts["lion", "total"] == 2 and counts["sea lion", "total"] == 1
    zero = {row["class"]: row for row in tables["-zero"]}
    assert set(zero) == {"zebra", "polar bear", "colt's foot"} and zero["polar bear"]["verdict"] == "absent"
    assert zero["zebra"]["verdict"] == "named in forms that do not count" and zero["zebra"]["forms"] == "plural 1"
    assert {"class": "sea lion", "stage": "b", "sentence": "the zebras and one sea lion ."} in tables["-examples"]
    assert "mine, total: 7 classes in 29 sentences, 3 (42.9%) never named" in capsys.readouterr().out
    counts = {(row["class"], row["stage"]): int(row["count"]) for row in
              run(tmp_path, plurals=True, longest=True, **options)[""]}  # fmt: skip
    assert counts["zebra", "b"] == 1 and counts["lion", "b"] == 1
    counts = {(row["class"], row["stage"]): int(row["count"]) for row in
              run(tmp_path, reference_rules=True, **options)[""]}  # fmt: skip
    assert counts["sea lion", "b"] == 1 and counts["sea lion", "total"] == 0  # the first stage does not name it
    (tmp_path / "a.json").write_text(json.dumps(conversations(9))[:700])
    tables = run(tmp_path, **options)
    assert {row["partial"] for row in tables[""] if row["stage"] in ("a", "total")} == {"True"}
    assert "Note: a is partial" in capsys.readouterr().out
    with pytest.raises(UserError, match="is not STAGE=FILE"):
        run(tmp_path, **options | {"texts": ("a.json",)})
    with pytest.raises(UserError, match="does not exist: fix --texts"):
        run(tmp_path, **options | {"texts": ("a=none.json",)})


def test_llavas_texts_are_checked_by_their_number_of_items(tmp_path, monkeypatch, capsys):
    module = script("scripts/prepare_data.py")
    monkeypatch.setenv("VLMCLASSIFIER_PATHS", str(tmp_path / "paths.toml"))
    (tmp_path / "paths.toml").write_text("[texts]\npretrain = 'a.json'\ninstruct = 'b.json'\n")
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(conversations(7)))
    with pytest.raises(UserError, match="a.json has 7 items, LLaVA's pretrain file has 558,128"):
        module.main(module.Args("llava-texts"))
    monkeypatch.setattr("vlmclassifier.preparing.texts.ITEMS", {"pretrain": 7, "instruct": 7})
    module.main(module.Args("llava-texts"))
    assert "b.json, 7 items, as LLaVA-1.5's" in capsys.readouterr().out
    (tmp_path / "b.json").write_text(json.dumps(conversations(7))[:300])
    with pytest.raises(UserError, match="b.json breaks behind item [0-9]"):
        module.main(module.Args("llava-texts"))


def test_the_benchmark_runs_and_finds_the_references_names():
    done = run_script("scripts/bench/bench_counting.py", "--sentences", 400, "--sample", 100, "--megabytes", 1, 1)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    for key in ("matching_vs_reference", "end_to_end_vs_reference", "scaling_two_processes", "peak_memory_mb"):
        assert result[key] > 0
