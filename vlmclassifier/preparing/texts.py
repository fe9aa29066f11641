"""LLaVA's two training texts: whether the files in paths.toml are whole, by their number of items."""

from pathlib import Path

from vlmclassifier.paths import local_path
from vlmclassifier.records import UserError

ITEMS = {"pretrain": 558_128, "instruct": 665_298}  # of blip_laion_cc_sbu_558k.json and llava_v1_5_mix665k.json


def check_texts() -> list[str]:
    """A sentence about each file. Raises UserError for one that is missing, broken, or has another number of items."""
    sentences = []
    for stage, expected in ITEMS.items():
        file = local_path("texts", stage)
        if file is None:
            raise UserError(f"paths.toml has no {stage} in [texts]: get the file (data/README.md) and write it there.")
        count = count_items(file)
        if count != expected:
            raise UserError(
                f"{file} has {count:,} items, LLaVA's {stage} file has {expected:,}: get it again (data/README.md); "
                "count_classes.py takes other texts with --texts."
            )
        sentences.append(f"{stage}: {file}, {count:,} items, as LLaVA-1.5's")
    return sentences


def count_items(file: Path) -> int:
    """How many conversations a JSON array has, without holding it. Raises UserError for a file that breaks."""
    import ijson

    count = 0
    try:
        with open(file, "rb") as stream:
            for count, _ in enumerate(ijson.items(stream, "item.conversations"), start=1):  # noqa: B007
                continue
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): fix paths.toml.") from None
    except (ijson.JSONError, UnicodeDecodeError) as error:
        raise UserError(f"{file} breaks behind item {count:,} ({str(error).splitlines()[0]}): get it again.") from None
    return count
