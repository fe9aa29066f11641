"""Protects: the demo shows what the scripts compute, its slider re-scores what is stored, and it works in a browser."""

import socket

import numpy as np
import pytest
from browser import chromium, wait
from conftest import noise, script

from vlmclassifier import load_clip, load_vlm
from vlmclassifier.prompts import WORDINGS
from vlmclassifier.ranking import Ranker
from vlmclassifier.records import UserError
from vlmclassifier.scoring.guidance import Scoring

NAMES = ["astroid", "circle", "a name that nobody trained"]


def test_both_models_answer_as_the_scripts(trained):
    demo = script("scripts/demo.py")
    models, image = demo.Models(demo.Args(weights=trained)), noise((60, 40))
    answer = models.answer(image, "mini-llava", "mini-clip", ["astroid", " circle ", "", *NAMES], "base")
    vlm = load_vlm("mini-llava", trained / "vlm")
    ranker = Ranker(vlm, NAMES, WORDINGS["base"])
    assert answer.names == NAMES and answer.free == vlm.ask(image, WORDINGS["base"])
    assert np.allclose(answer.log_probs, ranker.log_probs([image])[0], atol=1e-5)
    clip = load_clip("mini-clip", trained / "clip")
    best = clip.classify([image], clip.class_features(NAMES))[0]
    assert np.argsort(-answer.clip_scores).tolist() == best
    for t in (0.0, 1.0, 2.5):
        shown, expected = demo.guided(answer, t), Scoring(t=t, prior=ranker.prior())(answer.log_probs, np.ones(3))
        assert sum(shown.values()) == pytest.approx(1) and max(shown, key=shown.get) == NAMES[expected.argmax()]
    assert demo.guided(answer, 0.0) != demo.guided(answer, 1.0) and demo.guided(None, 1.0) == {}
    assert models.answer(image, "mini-llava", "mini-clip", NAMES, "base").free == answer.free  # nothing loaded anew


def test_mistakes_are_one_sentence(trained, tmp_path, monkeypatch):
    demo = script("scripts/demo.py")
    with pytest.raises(UserError, match="Type at least two different class names"):
        demo.Models(demo.Args(weights=trained)).answer(noise((9, 9)), "mini-llava", "mini-clip", ["a", "a "], "base")
    with pytest.raises(UserError, match="nothing-like-it"):
        demo.choices(demo.Args(models=("nothing-like-it",)))
    assert demo.choices(demo.Args())[1][0] == "clip-vit-l-336"
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(UserError, match=r"gradio is not installed: pip install .* '.\[demo\]'"):
        demo.main(demo.Args())


def test_a_real_photograph_goes_through_the_page(trained, realdata, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="gradio is not installed: .[demo]")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    demo = script("scripts/demo.py")
    photo = next((realdata / "images").rglob("*.jpg"))
    page = demo.build(demo.Args(weights=trained))
    with chromium() as browser:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        _, url, _ = page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
        try:
            browser.get(url)

            def one(css):
                return wait(browser, lambda b: b.find_elements(By.CSS_SELECTOR, css))[0]

            one("#image input[type=file]").send_keys(str(photo.resolve()))
            one("#image img")
            names = one("#names textarea")
            names.send_keys(Keys.CONTROL, "a")
            names.send_keys("\n".join(NAMES))
            one("#classify").click()
            said = wait(browser, lambda b: one("#clip textarea, #clip input").get_attribute("value"))
            assert said in NAMES
            wait(browser, lambda b: all(name in one("#ranking").text for name in NAMES))
            before = one("#ranking").text
            slider = one("#t input[type=number]")
            slider.send_keys(Keys.CONTROL, "a")
            slider.send_keys("0", Keys.TAB)
            wait(browser, lambda b: one("#ranking").text != before)
        finally:
            page.close()
