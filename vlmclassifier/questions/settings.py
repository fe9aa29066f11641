"""How questions are put to a model: the form of the answer, what the model is given, and chain of thought."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vlmclassifier.prompts import WORDINGS
from vlmclassifier.questions.items import LETTERS, ChoiceQuestion, with_name
from vlmclassifier.records import Prediction, UserError

# Form -> the beginning of the setting's name in tables; "multiple_choice" is the paper's.
FORMS = {
    "letters": "multiple_choice", "free": "free_answer", "rank_letters": "letters_log_prob",
    "rank_options": "options_log_prob", "naming": "naming",
}  # fmt: skip
# What is given -> the end of the name. "name" is the true class name in place of "this object", "own" the model's own.
INPUTS = {
    "image": "", "image+name": "-with_name", "text": "-text_only", "text+name": "-text_only-with_name",
    "text+own": "-text_only-own_name",
}  # fmt: skip


@dataclass(frozen=True)
class QuestionSetting:
    """One setting of all questions of a file.

    `form`: letters (the options are in the prompt, the answer is parsed), free (the question alone; right is an answer
    with the right option's text and no other's), rank_letters or rank_options (the options are in the prompt or not;
    the letter or text of the highest log-probability with the end token), naming (what the image shows). `thought`:
    chain of thought, of letters.
    """

    form: Literal[tuple(FORMS)] = "letters"
    given: Literal[tuple(INPUTS)] = "image"
    thought: bool = True

    @property
    def name(self) -> str:
        """The setting column of tables."""
        direct = "-direct" if self.form == "letters" and not self.thought else ""
        return FORMS[self.form] + direct + INPUTS[self.given]

    @property
    def config(self) -> dict[str, Any]:
        """What run.json records."""
        return {"setting": self.name, "form": self.form, "given": self.given, "chain_of_thought": self.has_thought}

    @property
    def has_thought(self) -> bool:
        """Whether the prompt asks for a chain of thought."""
        return self.thought and self.form == "letters"

    @property
    def new_tokens(self) -> int:
        """The longest answer in tokens (paper, section 4)."""
        return 1_024 if self.has_thought else 64

    @property
    def has_image(self) -> bool:
        """Whether the model is given the image."""
        return self.given.startswith("image")

    @property
    def is_ranked(self) -> bool:
        """Whether the answer is the likeliest letter or text, instead of generated words."""
        return self.form.startswith("rank_")

    def shown(self, question: ChoiceQuestion, own_name: Callable[[ChoiceQuestion], str] | None = None) -> str:
        """The text that the model is given. `own_name`: the model's name of a question's image, where it is needed."""
        if self.form == "naming":
            return WORDINGS["base"]
        name = None
        if self.given.endswith("+name"):
            name = question.class_name
        elif self.given.endswith("+own"):
            assert own_name is not None
            name = own_name(question)
        text = question.text if self.form in ("letters", "rank_letters") else question.question
        return with_name(text, name) if name else text

    def candidates(self, question: ChoiceQuestion) -> list[str]:
        """The answers that are ranked."""
        return list(question.options) if self.form == "rank_options" else list(LETTERS[: len(question.options)])

    def label(self, question: ChoiceQuestion) -> str:
        """What is right: the letter, of the naming of an image the class name."""
        return question.class_name if self.form == "naming" else question.letter

    def row(
        self, question: ChoiceQuestion, group: int, prompt: str, output: str, ranking: tuple[int, ...] | None = None
    ) -> Prediction:  # fmt: skip
        """The row of an answer (scoring.questions.Answers); of the naming of an image the label is the class name."""
        if self.form == "naming":
            return Prediction(question.id, self.label(question), group, prompt, None, output, None)
        return Prediction(question.id, self.label(question), group, prompt, question.options, output, ranking)


def check_question_settings(forms: tuple[str, ...], given: tuple[str, ...], thought: bool) -> list[QuestionSetting]:
    """One setting per form and input. Raises UserError for the same one twice."""
    settings = [QuestionSetting(form, what, thought) for form in forms for what in given]
    if len({setting.name for setting in settings}) < len(settings):
        raise UserError("--form or --given names one twice: name each once.")
    return settings
