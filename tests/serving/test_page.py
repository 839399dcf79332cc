"""The page of the server in Chromium, if it and playwright are installed."""

import shutil

import numpy as np
import pytest
from running_server import running_server

from keras_openllama import OpenLlamaCausalLM
from keras_openllama.generation.continuous_batching.named_adapters import NamedAdapters
from keras_openllama.serving.page import content_security_policy
from keras_openllama.serving.settings import ServerSettings

pytestmark = pytest.mark.backend_free

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
EVIL = "<img src=x onerror=document.title='evil'>"


def test_content_security_policy_allows_one_script_and_one_style():
    html = "<style>a {}</style><script>let x;</script>"
    policy = content_security_policy(html)
    assert policy.count("'sha256-") == 2
    assert policy != content_security_policy(html.replace("x", "y"))
    with pytest.raises(ValueError):
        content_security_policy(html + "<script>2</script>")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


class Page:
    """The page in a new window, and what it reported to the console."""

    def __init__(self, browser, url, **options):
        self.page = browser.new_context(**options).new_page()
        self.page.set_default_timeout(60_000)
        self.messages = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.goto(url)

    def wait_for_model(self):
        self.page.wait_for_selector("#model:text('nano')")

    def send(self, text, keys):
        self.page.fill("#input", text)
        self.page.keyboard.press(keys)
        self.wait_for_end()

    def wait_for_end(self):
        self.page.wait_for_selector("#again:not([disabled])")

    def texts(self, selector):
        return self.page.locator(selector).all_text_contents()


PHONE = {"viewport": {"width": 390, "height": 760}, "has_touch": True}
DARK = {"viewport": {"width": 1100, "height": 700}, "color_scheme": "dark"}


@pytest.mark.slow
@pytest.mark.parametrize("options", [PHONE, DARK], ids=["phone", "dark"])
def test_the_page_chats_by_keyboard(browser, server, options):
    window = Page(browser, server.url, **options)
    window.wait_for_model()
    page = window.page
    if options is PHONE:
        assert not page.is_visible("#seed")
        page.click("#toggle")
    page.fill("#max_tokens", "8")
    page.fill("#seed", "1")
    if options is PHONE:
        page.click("#toggle")
    window.send(EVIL, "Enter")
    (first,) = window.texts(".assistant")
    window.send("Who is Ahab?", "Enter")
    # What the user and the model write is text.
    assert window.texts(".user") == [EVIL, "Who is Ahab?"]
    assert page.title() == "keras_openllama" and not page.query_selector("#output img")
    assert "tokens/s" in page.inner_text("#status")
    before = window.texts(".assistant")
    assert before[0] == first and all(before)
    page.click("#again")
    window.wait_for_end()
    assert window.texts(".assistant") == before  # The same seed.
    page.click("#clear")
    assert not window.texts("#output > *")
    width = "() => document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(width)
    assert not window.messages


@pytest.mark.slow
def test_the_page_continues_texts_and_colours_tokens(browser, server, nano):
    window = Page(browser, server.url)
    window.wait_for_model()
    page = window.page
    page.select_option("#mode", "completion")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "8")
    page.check("#logprobs")
    window.send("The sea", "Control+Enter")
    expected = nano.generate("The sea", max_new_tokens=8)
    assert window.texts(".completion") == [expected]
    assert len(window.texts(".token")) == 8
    assert "%" in page.get_attribute(".token", "title")
    assert "hsl" in page.get_attribute(".token", "style") or "rgb" in (
        page.get_attribute(".token", "style")
    )
    assert not window.messages


@pytest.mark.slow
def test_the_page_offers_the_adapters_of_the_model(browser, tmp_path):
    lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
    adapted = OpenLlamaCausalLM.from_preset("open_llama_nano")
    adapted.backbone.enable_lora(2)
    for weight in adapted.trainable_variables:
        weight.assign(0.1 * np.ones(weight.shape))
    adapted.save_adapters(tmp_path / "law")
    adapters = NamedAdapters(lm)
    adapters.load("law", tmp_path / "law")
    with running_server(lm, adapters=adapters) as server:
        window = Page(browser, server.url)
        window.wait_for_model()
        page = window.page
        assert window.texts("#models option") == ["nano", "nano+law"]
        page.select_option("#models", "nano+law")
        page.fill("#temperature", "0")
        page.fill("#max_tokens", "6")
        window.send("The sea", "Control+Enter")
        found = window.texts(".completion")
    assert found == [adapted.generate("The sea", max_new_tokens=6)]
    assert found != [lm.generate("The sea", max_new_tokens=6)]
    assert not window.messages


@pytest.mark.slow
def test_the_stop_button_ends_a_text_and_keeps_it(browser, server):
    window = Page(browser, server.url)
    window.wait_for_model()
    page = window.page
    page.select_option("#mode", "completion")
    page.fill("#max_tokens", "250")
    page.fill("#input", "The sea")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#status:text('tokens/s')")
    page.keyboard.press("Escape")
    window.wait_for_end()
    (text,) = window.texts(".completion")
    assert text.startswith("The sea") and len(text) > len("The sea")
    server.wait_until_idle(10)


@pytest.mark.slow
def test_the_page_asks_for_the_api_key(browser, nano):
    with running_server(nano, ServerSettings(api_keys=("secret",))) as server:
        window = Page(browser, server.url)
        window.page.wait_for_selector("#key")
        window.page.fill("#key", "secret")
        window.page.keyboard.press("Enter")
        window.wait_for_model()
