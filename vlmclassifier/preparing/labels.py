"""Which class of a benchmark a name of somebody else's copy means."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from vlmclassifier.benchmarks import FLOWER_RENAMES, Benchmark
from vlmclassifier.records import UserError
from vlmclassifier.scoring.mentions import plain_words
from vlmclassifier.scoring.special import lemmas, synsets

# Caltech's folders whose names are not those of the classes; both face folders are one class (paper section 0).
CALTECH_FOLDERS = {"faces": "face", "faces easy": "face", "leopards": "leopard", "motorbikes": "motorbike",
                   "airplanes": "airplane"}  # fmt: skip
NO_CLASS = {"caltech": {"background google"}}  # folders that are left out
LEMMAS_ALIKE = 990  # of ImageNet's 1,000 positions; a copy in another order agrees on a handful


class ClassFinder:
    """Finds the class index for the names that a source uses, however it spells them."""

    def __init__(self, benchmark: Benchmark, names: Sequence[str]) -> None:
        self.benchmark, self.names = benchmark, tuple(names)
        self._index = {plain_words(name): index for index, name in reversed(list(enumerate(names)))}
        if benchmark.key == "imagenet":
            self._index |= {synset: index for index, synset in enumerate(synsets())}
        if benchmark.key == "flowers":
            self._index |= {plain_words(theirs): self._index[ours] for theirs, ours in FLOWER_RENAMES.items()}
        if benchmark.key == "caltech":
            self._index |= {theirs: self._index[ours] for theirs, ours in CALTECH_FOLDERS.items()}

    def find(self, name: str, where: str) -> int | None:
        """The class index of one name; None for a folder that is no class.

        `where`: what holds the name. Raises UserError for a number and for an unknown name (the nearest is told).
        """
        words = plain_words(name)
        if words in NO_CLASS.get(self.benchmark.key, ()):
            return None
        if words in self._index:
            return self._index[words]
        if year := re.fullmatch(r"(.*) ((?:19|20)\d\d)", words):  # the cars' official names end with it
            turned = f"{year[2]} {year[1]}"
            if turned in self._index:
                return self._index[turned]
        if words.isdecimal():
            raise UserError(
                f"{where} has the number {name} for a class name, which does not say which class it is: use the "
                "official archives or a copy with names (data/README.md)."
            )
        near = get_close_matches(words, self._index, 1, 0.0)[0]
        raise UserError(
            f"{where} has the class {name!r}, which is none of {self.benchmark.title}'s; the nearest is "
            f"{self.names[self._index[near]]!r}: is it another data set?"
        )

    def find_all(self, names: Sequence[str], where: str) -> list[int | None]:
        """The class indices of a whole list of names, as a label column has it.

        ImageNet's names are not unique, so that a list of 1,000 is taken in its order once WordNet's names confirm it.
        """
        if self.benchmark.key == "imagenet" and len(names) == len(self.names):
            alike = sum(
                bool({part.strip().lower() for part in theirs.split(",")} & {*all_names, ours.lower()})
                for theirs, ours, all_names in zip(names, self.names, lemmas(), strict=True)
            )
            if alike >= LEMMAS_ALIKE:
                return list(range(len(names)))
        return [self.find(name, where) for name in names]

    def check_complete(self, found: Iterable[int | None], where: str) -> None:
        """Raise UserError where not every class of the benchmark occurs."""
        missing = sorted(set(range(len(self.names))) - set(found))
        if missing:
            have, all_of_them = len(self.names) - len(missing), len(self.names)
            raise UserError(
                f"{where} has {have} of the {all_of_them} classes of {self.benchmark.title}; "
                f"{self.names[missing[0]]!r} is missing, say: get the whole data set."
            )
