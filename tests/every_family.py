"""Run by test_processes.py, also under accelerate: classify with every family; processes start a family together.

python every_family.py TINY IMAGES OUT LIMIT
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import script  # noqa: E402

from vlmclassifier.runs import Run  # noqa: E402

tiny, images, out, limit = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
state = PartialState(cpu=True)
torch.set_num_threads(1)
rows, append = {}, Run.append


def append_and_count(run: Run, predictions: list, values: object = None) -> None:
    """Run.append, which also counts the rows that this process computed."""
    append(run, predictions, values)
    rows[run.folder.name] = rows.get(run.folder.name, 0) + len(predictions)


Run.append = append_and_count
for folder in sorted(tiny.iterdir()):
    kind = "clip" if "clip" in folder.name else "vlm"
    module = script(f"main_results/classify_{kind}.py")
    options = {} if kind == "clip" else {"max_new_tokens": 12}
    args = module.Args(folder.name, folder, benchmark="flowers", split="all", data_root=images, limit=limit,
                       batch_size=2, out=out / folder.name, candidates="5", **options)  # fmt: skip
    state.wait_for_everyone()
    module.main(args)
(out / f"rows-{state.process_index}.json").write_text(
    json.dumps({"rows": rows, "processes": state.num_processes, "backend": state.backend})
)
