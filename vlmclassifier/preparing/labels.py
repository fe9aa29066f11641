"""Maps the class names of archives and copies to a benchmark's class indices."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from vlmclassifier.benchmarks import Benchmark
from vlmclassifier.class_lists import FLOWER_RENAMES, first_index
from vlmclassifier.records import UserError
from vlmclassifier.scoring.class_facts import lemmas, synsets
from vlmclassifier.scoring.mentions import plain_words

# Caltech's folders that are not named after their class; both face folders are one class, as in the paper.
CALTECH_FOLDERS = {"faces": "face", "faces easy": "face", "leopards": "leopard", "motorbikes": "motorbike",
                   "airplanes": "airplane"}  # fmt: skip
EXCLUDED_FOLDERS = {"caltech": {"background google"}}  # by benchmark
MIN_LEMMA_MATCHES = 990  # of ImageNet's 1,000 classes; a copy in another order matches only a few


class ClassFinder:
    """Finds the class index of a name as an archive or a copy writes it."""

    def __init__(self, benchmark: Benchmark, names: Sequence[str]) -> None:
        self.benchmark = benchmark
        self.names = tuple(names)
        self._index = first_index([plain_words(name) for name in names])
        if benchmark.key == "imagenet":
            for index, synset in enumerate(synsets()):
                self._index[synset] = index
        if benchmark.key == "flowers":
            for torchvision_name, paper_name in FLOWER_RENAMES.items():
                self._index[plain_words(torchvision_name)] = self._index[paper_name]
        if benchmark.key == "caltech":
            for folder_name, class_name in CALTECH_FOLDERS.items():
                self._index[folder_name] = self._index[class_name]

    def find(self, name: str, where: str) -> int | None:
        """Return the class index of one name, None for a folder that is excluded from the benchmark.

        `where`: the file or folder that has the name, for the error message. Raises UserError for a number and for an
        unknown name.
        """
        words = plain_words(name)
        if words in EXCLUDED_FOLDERS.get(self.benchmark.key, ()):
            return None
        if words in self._index:
            return self._index[words]
        if match := re.fullmatch(r"(.*) ((?:19|20)\d\d)", words):  # the cars' official names end with the year
            year_first = f"{match[2]} {match[1]}"
            if year_first in self._index:
                return self._index[year_first]
        if words.isdecimal():
            raise UserError(
                f"{where} has the number {name} as a class name, which does not identify a class: use the official "
                "archives or a copy with class names (data/README.md)."
            )
        nearest = get_close_matches(words, self._index, 1, 0.0)[0]
        raise UserError(
            f"{where} has the class {name!r}, which is not a class of {self.benchmark.title} (the nearest is "
            f"{self.names[self._index[nearest]]!r}): check that it is the right data set."
        )

    def find_all(self, names: Sequence[str], where: str) -> list[int | None]:
        """Return the class indices of a list of names, such as the names of a label column.

        Some of ImageNet's names are shared by two classes. A list of 1,000 names is therefore taken as the class order
        if WordNet's names of nearly every class confirm it.

        Raises UserError for a number and for an unknown name.
        """
        if self.benchmark.key == "imagenet" and len(names) == len(self.names):
            matches = 0
            for given, class_name, class_lemmas in zip(names, self.names, lemmas(), strict=True):
                given_parts = {part.strip().lower() for part in given.split(",")}
                if given_parts & {*class_lemmas, class_name.lower()}:
                    matches += 1
            if matches >= MIN_LEMMA_MATCHES:
                return list(range(len(names)))
        return [self.find(name, where) for name in names]

    def check_complete(self, found: Iterable[int | None], where: str) -> None:
        """Raise UserError unless every class index of the benchmark is in `found`."""
        missing = sorted(set(range(len(self.names))) - set(found))
        if missing:
            total = len(self.names)
            if self.benchmark.manifest is not None:  # the user's own
                raise UserError(f"{where} has no image of the class {self.names[missing[0]]!r}: fill its folder, or "
                                "remove it.")  # fmt: skip
            raise UserError(
                f"{where} has {total - len(missing)} of the {total} classes of {self.benchmark.title}; the first "
                f"missing class is {self.names[missing[0]]!r}: get the complete data set."
            )
