"""Correlate how often classes are named with how well they are classified (section 3.3, Figures 3 and 7, Table 11).

    python data_analysis/correlate.py --frequency outputs/data_analysis/imagenet.csv \
        --accuracy outputs/main_results/llava-1.5-7b-imagenet-open_world \
        --reference outputs/main_results/clip-vit-l-336-imagenet-closed_world
    python data_analysis/correlate.py --frequency freq.csv --frequency-column laion400m_text cc12m_text \
        --accuracy freq.csv --accuracy-column acc_ViT-L-14_laion400m --out outputs/data_analysis/laion

--accuracy is the folder of any run, or a CSV file with a column "class"; --frequency is a CSV of count_classes.py, with
a column "stage", or any other. Tables are joined on the class; names without a partner are listed. Prints and writes
correlations.csv: Spearman's coefficient, Pearson's of the counts (the paper's) and of log10(1 + count) (ours), for
every source and for named classes alone, with bootstrap intervals over classes, the middle 95% that shuffled classes
give, and the same over the paper's bins: bins inflate a correlation. With --reference also the coefficient given that
model's accuracy. slopes.csv has the regression of the log-odds on all sources at once, bins.csv the accuracy by count,
classes.csv the single classes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmclassifier import cli
from vlmclassifier.models import display_name
from vlmclassifier.paths import OUTPUTS
from vlmclassifier.records import UserError
from vlmclassifier.scoring.runs import score_run
from vlmclassifier.tables import markdown, write_csv

if TYPE_CHECKING:
    from pandas import DataFrame

TOTAL = "total"
CLASS, ACCURACY, IMAGES, RIGHT, REFERENCE = "class", "accuracy", "n", "right", "reference"
REFERENCE_IMAGES = "reference_n"


@dataclass
class Args:
    frequency: Path
    """CSV file with a column class: of count_classes.py, or any other."""
    accuracy: Path
    """Folder of a run, or a CSV file with a column class."""
    frequency_column: tuple[str, ...] = ("count",)
    """Columns with the counts: several sources."""
    accuracy_column: str = ACCURACY
    """Column with the accuracy in percent, of a CSV file."""
    reference: Path | None = None
    """Folder of another model's run (CLIP's), or a CSV file: the correlation given its accuracy."""
    reference_column: str = ACCURACY
    """Column with the reference's accuracy in percent, of a CSV file."""
    match_spelling: bool = False
    """Match class names whatever their case, with underscores as spaces."""
    out: Path | None = None
    """Folder of the results; default: outputs/data_analysis/RUN, or RUN-COUNTS for other rules or files of counts."""


def main(args: Args) -> None:
    """Join the tables, compute, write and print."""
    # ---- join
    classes, model = read_accuracy(args.accuracy, args.accuracy_column, args.match_spelling)
    sources = read_frequency(args.frequency, args.frequency_column, args.match_spelling)
    model["counts"] = counts_name(args.frequency)
    out = args.out or default_folder(args, model["counts"])
    out.mkdir(parents=True, exist_ok=True)
    joined = join(classes, sources, args, out)
    names = [name for name in sources.columns if name != CLASS]
    if args.reference:
        reference, _ = read_accuracy(args.reference, args.reference_column, args.match_spelling)
        reference = reference.drop(columns=RIGHT, errors="ignore")
        reference = reference.rename(columns={ACCURACY: REFERENCE, IMAGES: REFERENCE_IMAGES})
        joined = joined.merge(reference, how="left", on=CLASS)
        if missing := list(joined.loc[joined[REFERENCE].isna(), CLASS]):
            raise UserError(
                f"{args.reference} has no accuracy of {missing[0]!r} and of {len(missing) - 1} other classes: give a "
                "run on the same class list."
            )

    # ---- compute
    rows = [row for name in names for row in correlations(joined, name)]
    bins = [row for name in names for row in bin_rows(joined, name)]
    slopes = slope_rows(joined, names)

    # ---- write
    files = [write_csv(out / "classes.csv", joined.to_dict("records")),
             write_csv(out / "correlations.csv", [model | row for row in rows]),
             write_csv(out / "bins.csv", [model | row for row in bins])]  # fmt: skip
    if slopes:
        files.append(write_csv(out / "slopes.csv", [model | row for row in slopes]))
    report(model, rows, slopes)
    print("Written: " + ", ".join(str(file) for file in files) + ". Next: python data_analysis/table.py")


def counts_name(file: Path) -> str:
    """The rules by which count_classes.py has counted, or the name of another file. Raises UserError."""
    rules = file.with_suffix(".json")
    if not rules.exists():
        return file.stem
    try:
        return json.loads(rules.read_text(encoding="utf-8"))["rules"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{rules} does not say the rules of the counts: count again with count_classes.py.") from None


def default_folder(args: Args, counts: str) -> Path:
    """The folder of the results of one run and one way of counting."""
    name = args.accuracy.name if args.accuracy.is_dir() else args.accuracy.stem
    return OUTPUTS / "data_analysis" / (name if counts == "default" else f"{name}-{counts}")


def read_csv(file: Path) -> "DataFrame":
    """A table with a column class. Raises UserError."""
    import pandas as pd

    try:
        table = pd.read_csv(file, dtype={CLASS: str}, encoding="utf-8-sig", keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is no CSV file in UTF-8 ({str(error).splitlines()[0]}): fix it.") from None
    if CLASS not in table:
        raise UserError(f"{file} has no column 'class'; it has {', '.join(table.columns)}: name the column so.")
    return table


def numbers(table: "DataFrame", column: str, file: Path) -> "DataFrame":
    """The table with a column as numbers. Raises UserError for a missing column or cell."""
    import pandas as pd

    if column not in table:
        raise UserError(f"{file} has no column {column!r}; it has {', '.join(table.columns)}.")
    values = pd.to_numeric(table[column], errors="coerce")
    if values.isna().any():
        row = int(values.isna().to_numpy().nonzero()[0][0])
        raise UserError(f"{file} row {row + 2}: {column!r} of {table[CLASS][row]!r} is no number: fix it.")
    return table.assign(**{column: values})


def spelled(table: "DataFrame", match_spelling: bool, file: Path) -> "DataFrame":
    """The table with its classes as they are compared. Raises UserError for a class without a name."""
    if table[CLASS].isna().any():
        row = int(table[CLASS].isna().to_numpy().nonzero()[0][0])
        raise UserError(f"{file} row {row + 2} has no class: fix it.")
    names = table[CLASS].str.strip()
    return table.assign(**{CLASS: names.str.replace("_", " ").str.lower() if match_spelling else names})


def check_single(table: "DataFrame", file: Path, *keys: str) -> None:
    """Raise UserError for two rows of one class, which would be counted as two."""
    keys = keys or (CLASS,)
    doubled = table[table.duplicated(list(keys))]
    if len(doubled):
        what = " of ".join(repr(doubled.iloc[0][key]) for key in keys)
        raise UserError(f"{file} has {what} twice (or two spellings of it): leave one row per class.")


def read_accuracy(source: Path, column: str, match_spelling: bool) -> tuple["DataFrame", dict[str, str]]:
    """Class, accuracy in percent, and n and right where they are known; and what model it is of. Raises UserError."""
    if source.is_dir():
        score = score_run(source).scores[0]
        file, column = source / "classes.csv", ACCURACY
        model = {"model": score.model, "tags": ", ".join(score.tags), "setting": score.setting,
                 "dataset": score.dataset}  # fmt: skip
    else:
        file = source
        name = source.stem if column == ACCURACY else column
        model = {"model": display_name(name), "tags": "", "setting": column, "dataset": source.stem}
    table = numbers(read_csv(file), column, file)
    table = table.assign(**{ACCURACY: table[column]})
    if not table[ACCURACY].between(0, 100).all():
        raise UserError(f"{file}: the column {column!r} is no accuracy in percent (0 to 100): choose another one.")
    if IMAGES in table:
        table = numbers(table, IMAGES, file)
        if (table[IMAGES] <= 0).any():
            raise UserError(f"{file}: the column {IMAGES!r}, the number of images, is not above 0: fix it.")
    kept = [CLASS, ACCURACY, *(name for name in (IMAGES, RIGHT) if name in table and column == ACCURACY)]
    table = spelled(table[kept], match_spelling, file)
    if source.is_dir():  # classes of one name are counted as one in texts
        table = table.groupby(CLASS, sort=False)[[IMAGES, RIGHT]].sum().reset_index()
        table = table.assign(**{ACCURACY: 100 * table[RIGHT] / table[IMAGES]})
    check_single(table, file)
    return table, model


def read_frequency(file: Path, columns: Sequence[str], match_spelling: bool) -> "DataFrame":
    """Class and one column of counts per source: the columns, or the stages of count_classes.py. Raises UserError."""
    table = spelled(read_csv(file), match_spelling, file)
    for column in columns:
        table = numbers(table, column, file)
        if (table[column] < 0).any():
            raise UserError(f"{file}: the column {column!r} has negative counts: choose another one.")
    if "stage" in table:
        table = stages_as_columns(table, columns, file)
    else:
        check_single(table, file)
        table = table[[CLASS, *columns]]
    taken = {ACCURACY, IMAGES, RIGHT, REFERENCE, REFERENCE_IMAGES}
    if clash := [name for name in table.columns if name in taken]:
        raise UserError(f"{file}: a source cannot be called {clash[0]!r}, as the results are: rename it.")
    return table


def stages_as_columns(table: "DataFrame", columns: Sequence[str], file: Path) -> "DataFrame":
    """One row per class and one column per stage. Raises UserError where a class is not in every stage once."""
    if len(columns) > 1:
        raise UserError(f"{file} has stages, which are the sources: give one --frequency-column.")
    check_single(table, file, CLASS, "stage")
    order = list(dict.fromkeys(table["stage"]))
    wide = table.pivot(index=CLASS, columns="stage", values=columns[0])[order]
    if wide.isna().any(axis=None):
        name, stage = wide.isna().stack().idxmax()
        raise UserError(f"{file} has no count of {name!r} in stage {stage!r}: add it (0 where it is never named).")
    return wide.reset_index()


def join(classes: "DataFrame", sources: "DataFrame", args: Args, out: Path) -> "DataFrame":
    """The classes of both tables; names without a partner are printed and written. Raises UserError below three."""
    joined = classes.merge(sources, on=CLASS)
    alone = {str(args.accuracy): sorted(set(classes[CLASS]) - set(sources[CLASS])),
             str(args.frequency): sorted(set(sources[CLASS]) - set(classes[CLASS]))}  # fmt: skip
    for file, names in alone.items():
        if names:
            print(f"Note: {len(names)} classes are in {file} alone: {', '.join(names[:5])}"
                  f"{', ...' if len(names) > 5 else ''} (unmatched.csv)")  # fmt: skip
    write_csv(
        out / "unmatched.csv",
        [{CLASS: name, "only in": file} for file, names in alone.items() for name in names],
        [CLASS, "only in"],
    )
    if len(joined) < 3:
        raise UserError(
            f"{args.accuracy} and {args.frequency} share {len(joined)} classes: they are of two class lists; try "
            "--match-spelling."
        )
    return joined


def correlations(joined: "DataFrame", source: str) -> list[dict[str, Any]]:
    """All coefficients of one source."""
    from vlmclassifier.scoring.correlation import (
        STATISTICS,
        binned_spearman,
        correlate,
        equal_binned_spearman,
        partial_spearman,
    )

    rows = []
    for subset, part in (("all", joined), ("named", joined[joined[source] > 0])):
        if len(part) < 3:
            continue
        x, y = part[source].to_numpy(float), part[ACCURACY].to_numpy(float)
        statistics = dict(STATISTICS)
        if subset == "all":
            statistics |= {"spearman_of_bins": binned_spearman, "spearman_of_10_bins": equal_binned_spearman}
        for name, statistic in statistics.items():
            rows.append({"source": source, "classes": subset, "statistic": name} | correlate(x, y, statistic)._asdict())
        for given, column in ((REFERENCE, REFERENCE), ("images", IMAGES)):
            if column not in part or part[column].nunique() < 2:
                continue
            found = correlate(x, y, partial_spearman, part[column].to_numpy(float))
            rows.append({"source": source, "classes": subset, "statistic": f"spearman_given_{given}"} | found._asdict())
    return rows


def bin_rows(joined: "DataFrame", source: str) -> list[dict[str, Any]]:
    """Accuracy by count, in the paper's bins."""
    from vlmclassifier.scoring.correlation import bins

    found = bins(joined[source].to_numpy(float), joined[ACCURACY].to_numpy(float))
    return [{"source": source} | one._asdict() for one in found]


def slope_rows(joined: "DataFrame", sources: Sequence[str]) -> list[dict[str, Any]]:
    """The regression of the log-odds on log10(1 + count) of each source, and of all at once; with the reference too."""
    import numpy as np

    from vlmclassifier.scoring.correlation import log_odds, logistic_slopes

    if IMAGES not in joined:
        return []
    n = joined[IMAGES].to_numpy(float)
    right = joined[ACCURACY].to_numpy(float) * n / 100
    decades = {name: np.log10(1 + joined[name].to_numpy(float)) for name in sources}
    decades = {name: values for name, values in decades.items() if values.std() > 0}
    models = {name: {name: values} for name, values in decades.items()}
    several = {name: values for name, values in decades.items() if name != TOTAL}  # the total is the others' sum
    if len(several) > 1:
        models["together"] = several
    rows = []
    for model, predictors in models.items():
        for given in ("", REFERENCE) if REFERENCE in joined else ("",):
            if given:
                reference_n = joined[REFERENCE_IMAGES].to_numpy(float) if REFERENCE_IMAGES in joined else n
                odds = log_odds(joined[REFERENCE].to_numpy(float) / 100, reference_n)
                predictors = predictors | {"reference's log-odds": odds}
            try:
                found = logistic_slopes(right, n, predictors)
            except (ValueError, np.linalg.LinAlgError) as error:
                print(f"Note: no regression on {model}: {error}")
                continue
            rows += [{"regression": model, "given": given} | slope._asdict() for slope in found]
    return rows


def report(model: dict[str, str], rows: Sequence[dict[str, Any]], slopes: Sequence[dict[str, Any]]) -> None:
    """Print the coefficients with three decimals, and the regression."""
    import pandas as pd

    three = lambda row, *keys: " to ".join(f"{row[key]:.3f}" for key in keys)  # noqa: E731
    table = [{"source": row["source"], "classes": f"{row['classes']}, {row['n']}", "statistic": row["statistic"],
              "value": three(row, "value"), "95% interval": three(row, "low", "high"),
              "shuffled classes": three(row, "null_low", "null_high"), "p": f"{row['p']:.4f}"}
             for row in rows]  # fmt: skip
    print(f"{model['model']}, {model['setting']}, {model['dataset']}\n\n{markdown(pd.DataFrame(table))}\n")
    if slopes:
        table = [{"regression": row["regression"], "predictor (log10 of 1 + count)": row["predictor"],
                  "log-odds per unit": three(row, "value"), "95% interval": three(row, "low", "high"),
                  "dispersion": f"{row['dispersion']:.1f}"} for row in slopes]  # fmt: skip
        print(f"{markdown(pd.DataFrame(table))}\n")
    print("Bins inflate a correlation: spearman_of_bins is over the paper's bins, spearman_of_10_bins over ten bins of "
          "equally many classes, beside the classes' own; p is from shuffled classes.")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, Args, __doc__)
