"""The page of `funnel serve` in Chromium: every control with mouse and keyboard, errors, accessibility, phones."""

import contextlib
import csv
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from conftest import tiny_config

from funnel.data.tokenizer import FunnelTokenizer
from funnel.inference.classifier import Classifier
from funnel.inference.predictor import InputFormat
from funnel.model.heads import FunnelForSequenceClassification

try:
    import uvicorn
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

    from funnel.serving import server
    from funnel.serving.app import create_app
    from funnel.serving.engines import Input, ServedModel
    from funnel.serving.service import Service
    from funnel.serving.settings import Settings
except ImportError as error:
    pytest.skip(f"needs {error.name} (extras serve and test)", allow_module_level=True)
if shutil.which("chromium") is None:
    pytest.skip("needs Chromium (Debian: apt-get install chromium)", allow_module_level=True)

pytestmark = pytest.mark.slow

MAX_LENGTH = 16
MAX_TEXTS = 8
TOKEN = "correct-token"
MARKUP = "<img src=x onerror=alert(1)>"
PHONE = {"width": 390, "height": 844}
SINGLE, CLASS, SCORE = ("sentence",), "single_label_classification", "regression"
MODELS = {  # name: blocks, labels, problem, text columns
    "reviews": ("1,2,1", ["negative", "positive"], CLASS, SINGLE),
    "reviews-flat": ("2", ["negative", "positive"], CLASS, SINGLE),
    "intents": ("1,1", [*(f"intent {number}" for number in range(11)), MARKUP], CLASS, SINGLE),
    "score": ("1,1", ["score"], SCORE, SINGLE),
    "topics": ("1,1", ["sport", "science"], "multi_label_classification", SINGLE),
    "entailment": ("1,1", ["yes", "no"], CLASS, ("premise", "hypothesis")),
    "unknown": ("1,1", ["yes", "no"], CLASS, ()),
}


@pytest.fixture(scope="module")
def models() -> list[ServedModel]:
    """Random models of every kind."""
    tokenizer = FunnelTokenizer.train(["a warm film that stays with you . the plot makes no sense , a bad film !"] * 5)
    served = []
    for seed, (name, (blocks, labels, problem, columns)) in enumerate(MODELS.items()):
        torch.manual_seed(seed)
        config = tiny_config(
            vocab_size=tokenizer.vocab_size,
            blocks=blocks,
            num_decoder_layers=0,
            id2label=dict(enumerate(labels)),
            problem_type=problem,
            text_columns=columns,
        )
        classifier = Classifier(FunnelForSequenceClassification(config).eval(), tokenizer, InputFormat(MAX_LENGTH, columns))
        served.append(ServedModel(name, classifier))
    return served


@contextlib.contextmanager
def serve(models: list[ServedModel], token: str | None = None) -> Iterator[tuple[str, Service]]:
    """Serves the models in a thread; yields the address and the service."""
    settings = Settings(port=0, max_texts=MAX_TEXTS, max_file=0.01, batch_wait=0.0)
    with server.bind(settings) as listener:
        listener.listen(64)
        service = Service(models, settings, token)
        app = create_app(service)
        web_server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=web_server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield server.url_of(listener), service
        finally:
            web_server.should_exit = True
            thread.join(timeout=10)


@pytest.fixture(scope="module")
def served(models) -> Iterator[tuple[str, Service]]:
    with serve(models) as served:
        yield served


@pytest.fixture(scope="module")
def url(served) -> str:
    return served[0]


@pytest.fixture
def models_run(served) -> Callable[[Callable], Any]:
    """Passes the models by name to a function and returns its result. No request is processed in the meantime: explanations
    capture the attention weights of all models."""
    service = served[1]
    return lambda function: service.batcher.call(lambda: function(service.models)).result()


@pytest.fixture
def classify(models_run) -> Callable[..., Any]:
    """Reference predictions: classify(name of the model, texts, pairs)."""
    return lambda name, texts, pairs=None: models_run(lambda models: models[name].classifier(texts, pairs))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, url) -> Iterator[Callable[..., Page]]:
    """A function that opens the page. In the end, checks the console, and that no other host was asked for anything."""
    contexts, problems, hosts, allowed = [], [], set(), []

    def open(address: str = url, theme: str = "light", expected_errors: str = "", **options) -> Page:
        context = browser.new_context(color_scheme=theme, reduced_motion="reduce", **options)
        context.set_default_timeout(5000)
        contexts.append(context)
        allowed.append(expected_errors or "$^")
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.goto(address)
        return page

    yield open
    for context in contexts:
        context.close()
    assert [problem for problem in problems if not any(re.search(pattern, problem) for pattern in allowed)] == []
    assert {host.rpartition(":")[0] for host in hosts} <= {"127.0.0.1", ""}  # without a host: blob of a download


def predict(page: Page, texts: str, pairs: str | None = None) -> None:
    """Enters texts and waits for their results."""
    page.get_by_role("textbox").first.fill(texts)
    if pairs is not None:
        page.get_by_role("textbox").nth(1).fill(pairs)
    with page.expect_response("**/v1/predict"):
        page.get_by_role("button", name="Predict", exact=True).click()
    expect(page.locator("#results")).not_to_have_attribute("aria-busy", "true")


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


# --- texts ------------------------------------------------------------------------------------------------------------


def test_example_shows_label_probabilities_latency_and_explanation(open_page, classify):
    page = open_page()
    example = page.get_by_role("button", name="A warm, funny")
    text = example.inner_text()
    example.click()
    expected = classify("reviews", text)
    expect(page.locator(".value")).to_have_text(f"{expected.label} {percent(expected.probability)}")
    bars = page.get_by_role("list", name="Probabilities").get_by_role("listitem")
    expect(bars).to_have_text([f"{label}{percent(share)}" for label, share in expected.probabilities.items()])
    widths = page.locator(".bar").evaluate_all("bars => bars.map(bar => bar.offsetWidth / bar.parentElement.offsetWidth)")
    assert widths == pytest.approx(list(expected.probabilities.values()), abs=0.01)
    expect(page.locator("#summary")).to_have_text(re.compile(r"1 text[\d,.]+ ms in the server, [\d,.]+ ms with the network"))
    expect(page.get_by_role("status")).to_contain_text(f"reviews: {expected.label}")
    expect(page.get_by_role("heading", name=f"Positions in each block: {MAX_LENGTH} → 8 → 4")).to_be_visible()
    expect(page.locator(".positions")).to_have_count(3)
    widths = page.locator(".positions").evaluate_all("rows => rows.map(row => row.offsetWidth)")
    assert widths[0] > widths[1] > widths[2]


def test_ctrl_enter_lists_several_texts_and_keys_select_one(open_page, classify):
    page = open_page()
    texts = ["a warm film", "no sense", "you !"]
    page.get_by_label("Texts, one per line", exact=True).fill("\n".join(texts) + "\n")
    expect(page.locator("#texts-count")).to_have_text("3 texts")
    page.keyboard.press("Control+Enter")
    rows = page.get_by_role("row")
    expect(rows).to_have_count(4)
    for row, text, expected in zip(rows.all()[1:], texts, classify("reviews", texts), strict=True):
        assert row.inner_text().split() == [*text.split(), expected.label, percent(expected.probability)]
    page.get_by_role("button", name="no sense").focus()
    page.keyboard.press("Enter")
    expect(rows.nth(2)).to_have_attribute("aria-current", "true")
    expect(page.locator(".words")).to_contain_text("no sense")
    rows.nth(3).click()
    expect(page.locator(".words")).to_contain_text("you !")


def test_whole_field_can_be_one_text(open_page):
    page = open_page()
    page.get_by_label("The whole field is one text").press("Space")
    predict(page, "a warm film\nno sense")
    expect(page.get_by_role("table")).to_have_count(0)
    expect(page.locator(".words")).to_contain_text("film\nno")


def test_arrow_keys_and_pointer_show_shares_of_words_and_positions(open_page, models_run):
    page = open_page()
    text = "a warm 🎸 film , stays"
    predict(page, text)
    explanation = models_run(lambda models: models["reviews"].explain(Input(text)))
    words = page.get_by_role("listbox", name="Contribution of each token")
    readout = page.locator(".readout")
    words.focus()
    page.keyboard.press("ArrowRight")
    expect(readout).to_have_text(f"“a”: {percent(explanation['tokens'][1]['contribution'])}")
    page.keyboard.press("End")
    expect(words.get_by_role("option").last).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    expect(words.get_by_role("option").first).to_have_attribute("aria-selected", "true")
    words.get_by_text("🎸").hover()  # two UTF-16 units: the offsets of the words after it must not be shifted
    expect(readout).to_contain_text("“🎸”: ")
    special = [token["text"].strip() for token in explanation["tokens"] if token["start"] is None]
    assert words.inner_text() == f"{special[0]} {text} {special[1]}"

    blocks = page.get_by_role("listbox", name="Positions of block")
    expect(blocks).to_have_count(3)
    position = explanation["blocks"][1][1]
    blocks.nth(1).get_by_role("option").nth(1).hover()
    expect(readout).to_have_text(
        f"“a warm”: {percent(position['contribution'])}, position 2 of {len(explanation['blocks'][1])} in block 1"
    )
    assert words.locator(".linked").all_inner_texts() == ["a", "warm"]
    blocks.nth(2).focus()
    page.keyboard.press("ArrowDown")
    expect(readout).to_contain_text("in block 2")


def test_truncated_text_says_which_part_was_not_read(open_page):
    page = open_page()
    predict(page, "a warm film " * MAX_LENGTH)
    expect(page.locator("article h3")).to_contain_text("truncated")
    expect(page.locator(".unread")).to_contain_text("not read: film a warm film")


def test_markup_is_shown_as_text(open_page):
    page = open_page()
    page.get_by_label("Model", exact=True).select_option("intents")
    predict(page, f"{MARKUP}\n<script>document.title = 'x'</script>")
    page.get_by_role("button", name="Show all 12 labels").click()
    expect(page.locator(".bars")).to_contain_text(MARKUP)
    expect(page.get_by_role("table")).to_contain_text("<script>document.title = 'x'</script>")
    assert page.locator("#results img, #results script").count() == 0
    assert page.title() == "funnel"


# --- kinds of models --------------------------------------------------------------------------------------------------


def test_of_many_labels_the_ten_most_probable_are_shown_first(open_page, classify):
    page = open_page()
    page.get_by_label("Model", exact=True).select_option("intents")
    predict(page, "a warm film")
    probabilities = classify("intents", "a warm film").probabilities
    ranked = [f"{name}{percent(probabilities[name])}" for name in sorted(probabilities, key=lambda name: -probabilities[name])]
    bars = page.get_by_role("list", name="Probabilities").get_by_role("listitem")
    expect(bars).to_have_text(ranked[:10])
    page.get_by_role("button", name="Show all 12 labels").press("Enter")
    expect(bars).to_have_text(ranked)
    page.get_by_role("button", name="Show the top 10").click()
    expect(bars).to_have_count(10)


def test_regression_shows_the_score_and_multi_label_all_labels(open_page, classify):
    page = open_page()
    page.get_by_label("Model", exact=True).select_option("score")
    predict(page, "a warm film")
    score = classify("score", "a warm film").label
    assert float(page.locator(".value").inner_text()) == pytest.approx(score, rel=1e-3)
    page.get_by_label("Model", exact=True).select_option("topics")  # predicts the same text again
    labels = classify("topics", "a warm film").label
    expect(page.locator(".value")).to_have_text(", ".join(labels) or "no label")
    expect(page.locator(".bars .chosen")).to_have_count(len(labels))


def test_pairs_have_two_fields_whose_lines_must_match(open_page, classify):
    page = open_page()
    page.get_by_label("Model", exact=True).select_option("entailment")
    premises, hypotheses = page.get_by_label("premise, one per line"), page.get_by_label("hypothesis, one per line")
    premises.fill("a warm film\nno sense")
    hypotheses.fill("a film")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#texts-form").get_by_role("alert")).to_contain_text("2 first texts but 1 second text")
    expect(premises).to_have_attribute("aria-invalid", "true")
    hypotheses.fill("a film\nbad")
    page.keyboard.press("Control+Enter")
    expected = classify("entailment", ["a warm film", "no sense"], ["a film", "bad"])
    expect(page.get_by_role("row").nth(2)).to_contain_text(
        f"no sense / bad{expected[1].label}{percent(expected[1].probability)}"
    )
    expect(page.locator(".words > div")).to_have_count(2)


def test_second_field_is_optional_if_the_model_may_take_pairs(open_page, classify):
    page = open_page()
    page.get_by_label("Model", exact=True).select_option("unknown")
    for pair in (None, "a film"):
        predict(page, "no sense", pair)
        expected = classify("unknown", "no sense", pair)
        expect(page.locator(".value")).to_contain_text(percent(expected.probability))


def test_comparison_shows_both_models_and_how_often_they_disagree(open_page, classify):
    page = open_page()
    texts = ["a warm film", "no sense", "you !", "the plot", "bad , bad"]
    predict(page, "\n".join(texts))
    second = page.get_by_label("Compare with")
    assert page.locator("#second-model option:disabled").all_inner_texts() == ["entailment (takes pairs)"]
    second.focus()
    page.keyboard.press("ArrowDown")
    expect(second).to_have_value("reviews-flat")
    expect(page.locator("article.answer h3")).to_contain_text(["reviews", "reviews-flat"])
    predictions = [classify(name, texts) for name in ("reviews", "reviews-flat")]
    differing = sum(first.label != other.label for first, other in zip(*predictions, strict=True))
    expected = f"disagree on {differing}" if differing else "agree"
    expect(page.locator("#summary h2")).to_have_text(f"5 texts, the models {expected}")
    for number, of_model in enumerate(predictions):
        expect(page.locator("tbody tr").nth(3).locator("td").nth(number)).to_contain_text(percent(of_model[3].probability))
        expect(page.locator(".value").nth(number)).to_contain_text(percent(of_model[0].probability))
    first, other = (article.bounding_box() for article in page.get_by_role("article").all())
    assert first["y"] == other["y"]
    assert first["x"] < other["x"]


# --- errors and the token ---------------------------------------------------------------------------------------------


def test_errors_are_shown_next_to_the_control(open_page):
    page = open_page(expected_errors="503|ERR_FAILED")
    alert = page.locator("#texts-form").get_by_role("alert")
    button = page.get_by_role("button", name="Predict", exact=True)
    button.click()
    expect(alert).to_have_text("Enter a text.")
    expect(page.get_by_label("Texts, one per line", exact=True)).to_be_focused()
    page.keyboard.type("a\n" * (MAX_TEXTS + 1))
    expect(alert).to_be_empty()
    button.click()
    expect(alert).to_have_text("9 texts: the server accepts at most 8 texts per request. Predict a file instead.")
    answers: list[Callable[[Route], None]] = [
        lambda route: route.fulfill(status=503, json={"detail": "too many texts are waiting; try again later"}),
        lambda route: route.fulfill(status=503, body="<h1>Bad gateway</h1>"),
        lambda route: route.abort(),
    ]
    page.route("**/v1/predict", lambda route: answers.pop(0)(route))
    page.get_by_label("Texts, one per line", exact=True).fill("a warm film")
    for message in ("too many texts are waiting; try again later", "status 503", "The server does not answer."):
        button.click()
        expect(alert).to_contain_text(message)
        expect(button).to_have_text("Predict")
    page.unroute("**/v1/predict")
    page.route("**/v1/explain", lambda route: route.fulfill(status=503, json={"detail": "busy"}))
    button.click()
    expect(page.locator("#results").get_by_role("alert")).to_have_text("No explanation: busy")
    expect(page.locator(".positions")).to_have_count(3)  # the lengths are known nevertheless


def test_models_can_be_loaded_again_after_an_error(open_page, url):
    page = open_page("about:blank", expected_errors="ERR_FAILED")
    page.route("**/v1/models", lambda route: route.abort(), times=1)
    page.goto(url)
    expect(page.locator("#loading").get_by_role("alert")).to_contain_text("The server does not answer.")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_label("Model", exact=True)).to_be_visible()


def test_token_is_asked_for_and_kept_for_the_session_only(open_page, models):
    with serve(models[:1], TOKEN) as (address, _):
        page = open_page(address, expected_errors="401")
        field = page.get_by_label("Token of this server")
        expect(field).to_be_focused()
        page.keyboard.type("wrong-token")
        page.keyboard.press("Enter")
        expect(page.locator("#token-form").get_by_role("alert")).to_contain_text("did not accept")
        check_state(page)
        field.fill(TOKEN)
        page.get_by_role("button", name="Continue").click()
        expect(field).to_be_hidden()
        predict(page, "a warm film")
        expect(page.locator(".words")).to_be_visible()
        expect(page.get_by_label("Compare with")).to_be_disabled()  # there is one model
        page.reload()
        expect(page.get_by_label("Model", exact=True)).to_be_visible()
        stored = page.evaluate("JSON.stringify([{...localStorage}, document.cookie, location.href])")
        assert TOKEN not in stored
        assert page.evaluate("sessionStorage.length") == 1


# --- files ------------------------------------------------------------------------------------------------------------


RUNNING = {"status": "running", "done": 1, "total": 4, "detail": None}


def upload(page: Page, content: str, name: str = "my reviews.csv") -> None:
    page.get_by_role("tab", name="File").click()
    page.get_by_label("CSV, TSV or JSONL file").set_input_files(
        {"name": name, "mimeType": "text/csv", "buffer": content.encode()}
    )
    page.get_by_role("button", name="Predict file").click()


def test_file_shows_progress_and_gives_predictions(open_page, classify, tmp_path):
    page = open_page()
    page.route("**/v1/files/*", lambda route: route.fulfill(json=RUNNING), times=1)
    texts = ["a warm film", "no sense", "ü, 🎸", "you !"]
    page.get_by_role("tab", name="Texts").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="File")).to_be_focused()
    page.get_by_label("Text column (optional)", exact=True).fill("words")
    upload(page, "words,other\n" + "".join(f'"{text}",x\n' for text in texts))
    bar = page.get_by_role("progressbar", name="Progress of my reviews.csv")
    expect(bar).to_have_js_property("position", 0.25)
    expect(page.get_by_text("1 of 4 rows")).to_be_visible()
    expect(page.get_by_text("4 predictions", exact=True)).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download predictions").click()
    assert download.value.suggested_filename == "my reviews-predictions.csv"
    download.value.save_as(tmp_path / "predictions.csv")
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert labels == [prediction.label for prediction in classify("reviews", texts)]
    page.get_by_role("button", name="Remove").press("Enter")
    expect(page.get_by_role("progressbar")).to_have_count(0)


def test_file_can_be_cancelled(open_page, url):
    page = open_page()
    page.route(
        "**/v1/files/*", lambda route: route.fulfill(json=RUNNING) if route.request.method == "GET" else route.continue_()
    )
    with page.expect_response("**/v1/files?*") as created:
        upload(page, "sentence\nbad film\n")
    with page.expect_response(lambda response: response.request.method == "DELETE"):
        page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    page.unroute_all()
    job = created.value.json()["id"]
    assert page.request.get(f"{url}/v1/files/{job}").status == 404


def test_errors_of_files_are_one_line_next_to_the_file(open_page):
    page = open_page(expected_errors="422")
    page.get_by_role("tab", name="File").click()
    page.get_by_role("button", name="Predict file").click()
    alert = page.locator("#file-form").get_by_role("alert")
    expect(alert).to_have_text("Choose a file.")
    upload(page, "x" * 20_000)
    expect(alert).to_have_text(re.compile(r"my reviews.csv is 19.5 KiB; the server accepts at most 10.2 KiB. Split it."))
    page.get_by_label("Text column (optional)", exact=True).fill("absent")
    upload(page, "a,b\n1,2\n")
    failed = page.locator("#jobs").get_by_role("alert")
    expect(failed).to_contain_text("absent")
    assert "\n" not in failed.inner_text()
    page.get_by_role("button", name="Remove").click()
    expect(page.locator("#jobs li")).to_have_count(0)


# --- theme, accessibility, phones -------------------------------------------------------------------------------------


def test_theme_follows_the_system_until_it_is_chosen(open_page):
    page = open_page(theme="dark")
    button = page.get_by_role("button", name="Dark theme")
    expect(button).to_have_attribute("aria-pressed", "true")
    page.emulate_media(color_scheme="light")
    expect(button).to_have_attribute("aria-pressed", "false")
    button.click()
    page.reload()
    expect(button).to_have_attribute("aria-pressed", "true")
    button.press("Space")
    expect(button).to_have_attribute("aria-pressed", "false")


# The lowest contrast of a text, computed from the drawn colors: backgrounds are mixed in the order of their elements.
LOWEST_CONTRAST = """() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const draw = (...colors) => {
    context.clearRect(0, 0, 1, 1);
    for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map(value => value / 255);
  };
  const luminance = rgb => {
    const [r, g, b] = rgb.map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let lowest = [Infinity, ""];
  const hasText = element => [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim());
  const elements = [...document.querySelectorAll("body *")].filter(element =>
    element.checkVisibility() && !element.disabled && (element.matches("input, select, textarea") || hasText(element)));
  for (const element of elements) {
    const layers = [];
    for (let parent = element; parent; parent = parent.parentElement) layers.unshift(getComputedStyle(parent).backgroundColor);
    const a = luminance(draw("white", ...layers));
    const b = luminance(draw("white", ...layers, getComputedStyle(element).color));
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < lowest[0]) lowest = [contrast, element.outerHTML.slice(0, 100)];
  }
  return [...lowest, elements.length];
}"""


def check_state(page: Page) -> None:
    """Checks what holds in every state of the page: contrast, the rules of axe, and no horizontal scrolling."""
    contrast, element, count = page.evaluate(LOWEST_CONTRAST)
    assert count > 4
    assert contrast >= 4.5, element
    results = Axe().run(page, options={"resultTypes": ["violations"]})
    assert results.response["violations"] == [], json.dumps(results.response["violations"], indent=1)[:3000]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# Index of the focused control among all that can be focused, or -1; its outline; the number of controls.
FOCUSED_CONTROL = """() => {
  const controls = [...document.querySelectorAll("a, button, input, select, textarea, [role=listbox]")]
    .filter(element => element.checkVisibility() && !element.disabled && element.tabIndex >= 0);
  const style = getComputedStyle(document.activeElement);
  return [controls.indexOf(document.activeElement), style.outlineStyle + " " + style.outlineWidth, controls.length];
}"""


def check_tab_order(page: Page) -> None:
    """Checks that the Tab key reaches every control, in order, and that each shows its focus."""
    page.evaluate("document.activeElement.blur()")
    page.locator("h1").click()  # the order starts at the top
    for expected in range(page.evaluate(FOCUSED_CONTROL)[2]):
        page.keyboard.press("Tab")
        control, outline, _ = page.evaluate(FOCUSED_CONTROL)
        assert control == expected
        assert outline == "solid 2px"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_state_is_accessible_and_fits_a_phone(theme, open_page):
    page = open_page(theme=theme, viewport=PHONE, expected_errors="422")
    expect(page.get_by_text("Try an example")).to_be_visible()
    check_state(page)
    page.get_by_label("Compare with").select_option("reviews-flat")
    predict(page, f"a warm film {'x' * 200}\n{'no sense ' * 20}\n{MARKUP}")
    expect(page.locator(".words")).to_have_count(2)
    check_state(page)
    page.get_by_label("Texts, one per line", exact=True).fill("")
    page.keyboard.press("Control+Enter")
    page.get_by_label("Model", exact=True).select_option("entailment")
    expect(page.get_by_label("hypothesis, one per line")).to_be_visible()
    page.get_by_role("tab", name="File").click()
    upload(page, "premise,hypothesis\nbad film,a film\n", "a_long_name" * 9 + ".csv")
    expect(page.get_by_text("1 prediction", exact=True)).to_be_visible()
    page.get_by_label("Text column (optional)", exact=True).fill("absent")
    upload(page, "a,b\n1,2\n")
    expect(page.locator("#jobs").get_by_role("alert").first).to_contain_text("absent")
    check_state(page)


def test_tab_key_reaches_every_control_in_order(open_page):
    page = open_page()
    expect(page.get_by_text("Try an example")).to_be_visible()
    check_tab_order(page)
    page.get_by_label("Compare with").select_option("intents")
    predict(page, "a warm film\nno sense")
    expect(page.locator(".words")).to_have_count(2)
    check_tab_order(page)
    upload(page, "sentence\nbad film\n")
    expect(page.get_by_role("button", name="Download predictions")).to_be_visible()
    check_tab_order(page)


def test_loading_is_shown_while_the_server_computes(open_page):
    page = open_page()
    pending: list[Route] = []
    page.route("**/v1/predict", lambda route: pending.append(route))
    page.get_by_label("Texts, one per line", exact=True).fill("a warm film")
    button = page.locator("#predict")
    button.click()
    expect(button).to_have_text("Predicting…")
    page.get_by_label("Texts, one per line", exact=True).fill("no sense")
    button.click()  # replaces the first request
    page.wait_for_timeout(50)
    pending[-1].continue_()
    expect(button).to_have_text("Predict")
    expect(page.locator(".words")).to_contain_text("no sense")
