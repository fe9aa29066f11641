"""Thinking models: the marks around their thoughts, and the answer that follows."""

MARKS = (  # opening and closing mark of a thought, by family
    ("<think>", "</think>"),  # Qwen3, GLM-V, InternVL3.5, DeepSeek, MiniMax
    ("<thinking>", "</thinking>"),
    ("<seed:think>", "</seed:think>"),  # Seed
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),  # Kimi K3
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
)
SWITCHES = ("enable_thinking", "thinking")  # variables of chat templates that turn thoughts off when they are false


def final_answer(text: str, prompt: str = "") -> tuple[str, bool]:
    """The part of a model's text that is its answer, and whether the thought before it was cut off.

    The answer is what follows the last closing mark. A thought that is opened and not closed, in the text or by the end
    of the prompt, leaves no answer: ("", True).
    """
    ends = [text.rfind(closing) + len(closing) for _, closing in MARKS if closing in text]
    rest = text[max(ends) :] if ends else text
    is_open = any(opening in rest for opening, _ in MARKS) or (not ends and opened_by(prompt) is not None)
    return ("", True) if is_open else (rest, False)


def opened_by(prompt: str) -> tuple[str, str] | None:
    """The marks of the thought that a prompt opens at its end; None where it opens none."""
    end = prompt.rstrip()
    return next((marks for marks in MARKS if end.endswith(marks[0])), None)
