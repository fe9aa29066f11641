"""Which class an answer is nearest to in meaning, by any sentence-transformers model in a local folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmclassifier.records import Prediction, UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor


class Encoder:
    """A sentence-transformers model, and the embeddings of the class lists that it has encoded."""

    def __init__(self, folder: Path, device: str | None = None) -> None:
        """`device`: where it runs; None is a GPU where there is one.

        Raises UserError for a folder that is no sentence-transformers model or cannot be loaded.
        """
        if not (folder / "modules.json").is_file():
            raise UserError(
                f"{folder} is no sentence-transformers model (it has no modules.json): name a folder that was saved "
                "by SentenceTransformer.save, or downloaded completely."
            )
        from sentence_transformers import SentenceTransformer  # seconds

        try:
            self.model = SentenceTransformer(str(folder), device=device, local_files_only=True)
        except Exception as error:  # safetensors, tokenizers and the library itself raise kinds of their own
            raise UserError(
                f"The model in {folder} cannot be loaded ({first_line(error)}): download it again."
            ) from None
        self._names: dict[tuple[str, ...], Tensor] = {}

    def nearest(self, predictions: Sequence[Prediction], names: Sequence[str]) -> list[str | None]:
        """The name with the largest cosine to each answer, of the image's candidates where it has some.

        Of names that are equally near the first counts; an answer without a word has none.
        """
        distinct = tuple(dict.fromkeys(names))
        if distinct not in self._names:
            self._names[distinct] = self._embed(distinct)  # [names, width]
        place = {name: number for number, name in enumerate(distinct)}
        answers = [answer for answer in dict.fromkeys(p.output for p in predictions) if answer.strip()]
        row = {answer: number for number, answer in enumerate(answers)}  # answers repeat: each is read once
        cosines = self._embed(answers) @ self._names[distinct].T if answers else None  # [answers, names]
        found: list[str | None] = []
        for p in predictions:
            if p.output not in row:
                found.append(None)
                continue
            one = cosines[row[p.output]]  # [names]
            among = None if p.choices is None else sorted(place[name] for name in p.choices)
            best = int((one if among is None else one[among]).argmax())
            found.append(distinct[best if among is None else among[best]])
        return found

    def _embed(self, texts: Sequence[str]) -> "Tensor":
        """Unit vectors, float32 on the CPU [texts, width]."""
        vectors = self.model.encode(
            list(texts), batch_size=64, convert_to_tensor=True, normalize_embeddings=True,
            show_progress_bar=len(texts) > 1000,
        )  # fmt: skip
        vectors = vectors.float().cpu()
        if not vectors.isfinite().all():
            raise UserError(
                "The sentence-transformers model of --semantic gives embeddings that are not finite numbers: its "
                "weights are damaged; download it again."
            )
        return vectors
