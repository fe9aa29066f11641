"""Write the page: index.html, its style and script, figures as SVG, and the examples."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vlmclassifier.paths import PROJECT_ROOT
from vlmclassifier.records import UserError
from vlmclassifier.reporting.collect import Collected, collect, versions_of
from vlmclassifier.reporting.examples import Browser, browsers, image_folder, script_data, write_thumbnails
from vlmclassifier.reporting.findings import of_released_models, verdicts

PAGE = Path(__file__).parent / "page"
MARK = "report.json"  # says that a folder holds a report, which may be replaced


@dataclass(frozen=True)
class Written:
    """What was written."""

    page: Path
    megabytes: float
    examples: int
    notes: Sequence[str]


def write_report(
    root: Path, out: Path, title: str, data_root: Path | None, most: int, notes: Sequence[str] = ()
) -> Written:  # fmt: skip
    """Write the report of an outputs folder; an older one in the same folder is replaced. Raises UserError.

    `notes`: what the page must say beside what is found missing here.
    """
    out = out.resolve()  # "." has no name
    if out.exists() and not (out / MARK).exists() and any(out.iterdir()):
        raise UserError(f"{out} holds something else: choose another --out.")
    new = out.with_name(f".{out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    collected = collect(root, out)
    collected.notes[:0] = notes
    draw_figures(root, collected, new)
    found = browsers(root, collected.folders, most, collected.notes)
    for number, one in enumerate(found):
        add_images(one, number, root, collected.notes, new, data_root)
    (new / "examples.js").write_text(script_data(found), encoding="utf-8")
    for file in ("style.css", "report.js"):
        shutil.copy(PAGE / file, new / file)
    (new / "index.html").write_text(render(root, title, collected, found), encoding="utf-8")
    (new / MARK).write_text('{"report": 1}\n', encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 2**20
    return Written(out / "index.html", size, sum(len(one.ids) for one in found), collected.notes)


def shown_path(folder: Path) -> str:
    """A folder as it is written on the page: from the project's folder on, where it is in it."""
    full = folder.resolve()
    return full.relative_to(PROJECT_ROOT).as_posix() if full.is_relative_to(PROJECT_ROOT) else str(folder)


def draw_figures(root: Path, collected: Collected, out: Path) -> None:
    """Every figure that has data, as OUT/figures/SECTION-NAME.svg; one that cannot be drawn becomes a note."""
    from vlmclassifier.plotting import FIGURES, to_svg

    (out / "figures").mkdir()
    for section in collected.sections:
        for plot in FIGURES[section.key]:
            try:
                figure = plot.draw(root / section.key)
                if figure is None:
                    continue
                file = f"figures/{section.key}-{plot.name}.svg"
                (out / file).write_text(to_svg(figure), encoding="utf-8")
            except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                collected.notes.append(f"{plot.title} cannot be drawn ({type(error).__name__}: {error}): write the "
                                       f"tables of {section.key} again.")  # fmt: skip
                continue
            section.figures.append({"name": plot.name, "title": plot.title, "alt": plot.alt, "file": file})


def add_images(
    one: Browser, number: int, root: Path, notes: list[str], out: Path, data_root: Path | None
) -> None:  # fmt: skip
    """The thumbnails of a browser, with a note on what is left out."""
    images = image_folder(one.dataset, one.config, root, data_root)
    failed = write_thumbnails(one, images, out, number)
    if failed:
        where = images or "no folder: give --data-root DIR, or write it into paths.toml"
        notes.append(f"{failed:,} of {len(one.ids):,} images of {one.title} are not shown ({where}).")
    if one.total > len(one.ids):
        notes.append(f"{one.title}: the first {len(one.ids):,} of {one.total:,} examples are in the browser "
                               "(--examples N).")  # fmt: skip


def render(root: Path, title: str, collected: Collected, found: Sequence[Browser]) -> str:
    """The HTML of the page; every text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    figures = {(section.key, figure["name"]): figure for section in collected.sections for figure in section.figures}
    has_runs = any(section.runs for section in collected.sections)
    rows = [vars(row) for row in collected.findings] or of_released_models(root)
    return environment.get_template("index.html").render(
        title=title, root=shown_path(root), written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        verdicts=verdicts(rows, has_runs), other=[row for row in rows if not row["finding"]], figures=figures,
        sections=collected.sections, browsers=found, notes=collected.notes, versions=versions_of(collected),
    )  # fmt: skip
