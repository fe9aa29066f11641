"""Protects: the tables of training compare with the paper what was trained as in the paper, and name what was not."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script, script

from vlmclassifier.benchmarks import find_benchmark
from vlmclassifier.finetuning.settings import LORA, PAPER, QFORMER, deviations, mixed_files, paper_epochs
from vlmclassifier.finetuning.trainer import ShardingCheck
from vlmclassifier.records import UserError

CONFIG = PAPER | {
    "model": "llava-1.5-7b", "benchmark": "flowers", "train": "projector", "epochs": None, "wording": "base",
    "captions": None, "mix": [], "lora": None, "held_out": 0.0, "limit": None, "train_images": 2040,
    "template": "llava-1.5", "captioner": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "tags"),
    [
        ({}, []),
        ({"epochs": 50}, []),
        ({"epochs": 3}, ["3 epochs"]),
        ({"steps": 200}, ["steps 200"]),
        ({"objective": "names", "learning_rate": 1e-3}, ["objective names", "learning_rate 0.001"]),
        ({"wording": "in_the_photo"}, []),
        ({"wording": "alternative_1"}, ["wording alternative_1"]),
        ({"train": "projector+lora", "lora": LORA}, []),
        ({"train": "projector+lora", "lora": LORA | {"rank": 8}}, ["LoRA rank 8"]),
        (QFORMER | {"train": "qformer", "wording": "none"}, []),
        ({"lora_rate": 1e-3}, []),
        ({"train": "projector+lora", "lora": LORA, "lora_rate": 0.1 * 3e-3}, ["lora_rate 0.0003"]),
        ({"train": "qformer"}, ["weight_decay 0", "image_size None", "augment False"]),
        ({"mix": [["x.json", "", 1.0], ["x.json", "", 2.0]]}, ["mixed with 1 x x.json, 2 x x.json"]),
        ({"benchmark": "imagenet", "train_images": 1281167, "mix": [["llava_v1_5_mix665k.json", "", 1.0]]}, []),
        ({"limit": 100, "train_images": 100}, ["100 of 2,040 train images"]),
        ({"benchmark": "imagenet", "train_images": 5}, ["5 of 1,281,167 train images"]),
        ({"template": "llava-next-mistral"}, ["template llava-next-mistral"]),
        ({"template": "llava-v1", "pad_square": True}, []),
        ({"captions": "digest", "captioner": "llava-1.5-7b"}, ["captions by llava-1.5-7b"]),
        ({"benchmark": "mine", "limit": 100, "train_images": 100}, ["limit 100"]),
    ],
)
def test_what_differs_from_the_paper_is_named(changed, tags):
    assert deviations(CONFIG | changed) == tags


def test_epochs_are_the_papers():
    assert [paper_epochs(train, of) for train in ("projector", "qformer") for of in ("imagenet", "cars")] == [
        1, 50, 10, 100
    ]  # fmt: skip


def training(folder, right, finished=True, **changed):
    """A folder of a training with one epoch on the test images."""
    config = CONFIG | changed
    folder.mkdir(parents=True)
    record = {"config": config, "tags": [], "deviations": deviations(config), "finished": finished}
    (folder / "training.json").write_text(json.dumps(record))
    n = find_benchmark("flowers").paper_rows["test"]
    (folder / "epochs.csv").write_text(f"epoch,step,test,test_n\n1.0,10,{right},{n}\n")


def test_the_papers_rule_is_applied_to_what_the_paper_trained(tmp_path, capsys):
    training(tmp_path / "as-the-paper", 90)
    training(tmp_path / "held-out", 80, held_out=0.1)
    training(tmp_path / "other-objective", 70, objective="expected")
    training(tmp_path / "not-finished", 60, finished=False)
    training(tmp_path / "captions-and-mixture", 50, captions="digest", mix=[["x.json", "", 1.0]])
    table = script("training_analysis/table.py")
    table.main(table.Args(tmp_path, tmp_path / "none", tmp_path / "none"))
    printed = capsys.readouterr().out
    assert "Note: not-finished is not finished: its best epoch on test images is not shown." in printed
    with open(tmp_path / "table3.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["value"]]
    assert [(float(row["value"]), row["tags"]) for row in rows] == [
        (pytest.approx(90, abs=0.1), ""),
        (pytest.approx(80, abs=0.1), "10% of the train rows held out"),
        (pytest.approx(70, abs=0.1), "objective expected"),
    ]
    with open(tmp_path / "section4.csv", newline="") as stream:
        (row,) = [row for row in csv.DictReader(stream) if row["value"]]
    assert float(row["value"]) == pytest.approx(50, abs=0.1) and "mixed with 1 x x.json" in row["tags"]
    training(tmp_path / "twice", 91)
    table.main(table.Args(tmp_path, tmp_path / "none", tmp_path / "none"))
    printed = capsys.readouterr().out
    assert "LLaVA1.5-7B (as-the-paper) " in printed and "LLaVA1.5-7B (twice) " in printed  # none hides the other


def test_files_of_one_name_are_two_parts_of_a_mixture(tmp_path):
    texts = [str(tmp_path / "a" / "x.json"), f"{tmp_path / 'b' / 'x.json'}=2"]
    assert [(file.parent.name, weight) for file, weight in mixed_files(texts, tmp_path)] == [("a", 1.0), ("b", 2.0)]


def test_sharded_trainings_that_would_not_do_what_they_say_are_refused():
    model = SimpleNamespace(parameters=lambda: [SimpleNamespace(full_tensor=None)])
    trainer = SimpleNamespace(vlm=SimpleNamespace(model=model), is_deepspeed_enabled=True)
    with pytest.raises(UserError, match="--skip-spikes does not work under DeepSpeed"):
        ShardingCheck(trainer, False, True).on_train_begin(None, None, None)
    with pytest.raises(UserError, match="Sharded processes cannot answer images after an epoch: add --held-out 0"):
        ShardingCheck(trainer, True, False).on_train_begin(None, None, None)
    ShardingCheck(trainer, False, False).on_train_begin(None, None, None)


def test_launchers_classify_with_finished_trainings_alone(tmp_path):
    source = f"source {ROOT}/training_analysis/finetune.bash; is_trained {tmp_path}/run && echo yes || echo no"
    env = {"VLMCLASSIFIER_OUTPUTS": str(tmp_path)}
    assert run_script("bash", "-c", source, env=env).stdout == "no\n"
    for finished, said in ((False, "no\n"), (True, "yes\n")):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "training.json").write_text(json.dumps({"config": {}, "finished": finished}, indent=1))
        assert run_script("bash", "-c", source, env=env).stdout == said


def test_several_gpus_without_a_launcher_are_refused(monkeypatch):
    """Trainer would divide each batch over them, and the step would have more rows than was said."""
    module = script("training_analysis/finetune_vlm.py")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="This process sees 4 GPUs: start it by accelerate launch"):
        module.check_gpus("cuda")
    module.check_gpus("cpu")
    monkeypatch.setenv("WORLD_SIZE", "4")
    module.check_gpus("cuda")


def test_correlations_before_and_after_stand_beside_the_papers(tmp_path, capsys):
    """Table 11's fine-tuned row is the projector trained on the data set itself."""
    header = "model,tags,setting,dataset,source,classes,statistic,value,low,high,null_low,null_high,p,n,counts"
    rows = {
        "base": ',open_world,flowers,total,all,spearman,0.41,0.2,0.6,-0.2,0.2,0.001,102,default',
        "tuned": '"fine-tuned: projector on flowers, best",open_world,flowers,total,all,spearman,-0.04,-0.2,0.2,-0.2,'
                 "0.2,0.7,102,default",
        "short": '"fine-tuned: projector on flowers, last, 3 epochs",open_world,flowers,total,all,spearman,0.5,-0.2,'
                 "0.2,-0.2,0.2,0.7,102,default",
        "elsewhere": '"fine-tuned: projector on cars, best",open_world,flowers,total,all,spearman,0.3,-0.2,0.2,-0.2,'
                     "0.2,0.7,102,default",
    }  # fmt: skip
    for name, row in rows.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "correlations.csv").write_text(f"{header}\nLLaVA1.5-7B,{row}\n")
    table = script("data_analysis/table.py")
    table.main(table.Args(tmp_path / "data"))
    printed = capsys.readouterr().out
    assert "LLaVA1.5-7B Fine-tuned on ImageNet | open_world-held_out | flowers" in " ".join(printed.split())
    assert "-0.04 [-0.20, 0.20] (-0.03)" in printed and "0.41 [0.20, 0.60] (0.40)" in printed
    with open(tmp_path / "data" / "table11.csv", newline="") as stream:
        found = {row["value"]: (row["model"], row["paper"]) for row in csv.DictReader(stream)}
    assert found["0.5"] == found["0.3"] == ("LLaVA1.5-7B", "")  # not as in the paper; not on this data set
    training(tmp_path / "runs" / "one", 90)
    table = script("training_analysis/table.py")
    table.main(table.Args(tmp_path / "runs", tmp_path / "none", tmp_path / "none", tmp_path / "data"))
    printed = capsys.readouterr().out
    assert "Spearman, naming texts and accuracy over n classes" in printed and "| 0.41" in printed
    with open(tmp_path / "runs" / "frequency.csv", newline="") as stream:
        values = [float(row["value"]) for row in csv.DictReader(stream)]
    assert values[0] == 0.41 and set(values[1:]) == {-0.04, 0.5, 0.3}  # as it is first
