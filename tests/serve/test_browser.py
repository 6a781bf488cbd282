"""The page in a real browser, on a real server."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browsers import browser, chromium, seen
from served import measured_file, running, started

from edgemoe.runtime.opening import open_model
from edgemoe.runtime.options import EngineOptions

HOSTILE = """<script>window.hurt = 1</script> <img src="https://evil.test/x.png" onerror="window.hurt = 1">
![picture](https://evil.test/y.png) [click](javascript:window.hurt=1) <a href="https://evil.test" onclick="hurt=1">a</a>
<style>body { display: none }</style> <iframe src="https://evil.test"></iframe> <form action="https://evil.test"><input></form>
**bold** `code` <svg><script>window.hurt=1</script></svg> <math><mtext><table><mglyph><style><img src=x onerror=hurt=1>
[link](https://good.test/ "t") [data](data:text/html,<script>hurt=1</script>) <https://auto.test>

| a | b |
|---|---|
| <img src=x onerror=hurt=1> | 2 |

```html
<b>as written</b>
```
"""


@pytest.fixture(scope="module")
def slow(tiny_moe):
    """A slow server with memory for half of the experts, whose replies never end by themselves."""
    chromium()
    opened = open_model(tiny_moe, EngineOptions())
    half = {"slots": opened.model.budget.experts // 2}
    sampling = replace(opened.text.sampling, ignore_eos=True, max_tokens=40, seed=1)
    with running(tiny_moe, sampling=sampling, options=half) as found:
        step = found.service.batcher.step

        def slowly():
            time.sleep(0.01)
            return step()

        found.service.batcher.step = slowly
        yield found


@pytest.fixture(scope="module")
def chrome():
    with browser() as found:
        yield found


@pytest.fixture
def page(chrome, slow):
    with seen(chrome, slow.url) as found:
        yield found
    slow.settle()


def until(page, what):
    """Waits until an expression holds on the page. It is passed as a function, as the page's policy forbids eval."""
    page.wait_for_function(f"() => {what}")


def ask(page, text="Say it."):
    page.fill("#text", text)
    page.press("#text", "Enter")


def done(page, count):
    """Waits until so many replies are complete."""
    page.wait_for_function(
        "n => document.querySelectorAll('.turn.assistant .figures, .turn.assistant .error').length === n",
        arg=count,
    )


def test_a_reply_comes_with_its_figures(page, slow):
    ask(page)
    done(page, 1)
    assert page.locator(".turn.user").inner_text().startswith("You")
    figures = page.locator(".figures").inner_text()
    for word in ("tokens/s", "first token after", "40 tokens", "hits", "read", "#"):
        assert word in figures
    assert "tiny" in page.locator("#model").inner_text()
    until(page, "document.querySelector('#state').textContent === 'idle'")
    page.reload()  # the conversation is still there
    assert page.locator(".turn").count() == 2
    page.click("#tab-log")
    until(page, "document.querySelectorAll('#log tbody tr').length > 0")
    assert "/v1/chat/completions" in page.locator("#log tbody tr").first.inner_text()


def test_stop_keeps_the_text_and_frees_the_engine(page, slow):
    page.click("#tab-settings")
    page.get_by_label("Most tokens").fill("400")
    ask(page)
    until(page, "document.querySelector('.turn.assistant .content').textContent.length > 10")
    assert slow.service.batcher.running()
    page.click("#stop")
    until(page, "document.querySelector('#stop').hidden")
    slow.settle()
    assert "Stopped" in page.locator(".turn.assistant .foot").inner_text()
    assert len(page.locator(".turn.assistant .content").inner_text()) > 10
    ask(page, "Again.")  # Escape does the same
    until(page, "document.querySelectorAll('.turn.assistant .content')[1].textContent.length > 10")
    page.keyboard.press("Escape")
    slow.settle()
    assert page.locator("#stop").is_hidden()


def test_edit_and_regenerate_go_on_from_any_turn(page, slow):
    for i in range(2):
        ask(page, f"Say {i}.")
        done(page, i + 1)
    first = page.locator(".turn.assistant .content").first.inner_text()
    page.get_by_role("button", name="Regenerate").first.click()
    done(page, 1)
    assert page.locator(".turn").count() == 2
    assert page.locator(".turn.assistant .content").inner_text() == first  # it has the same seed
    kept = int(page.locator(".figures").inner_text().partition(" kept")[0].rpartition(" ")[2])
    assert kept > 0
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit message").fill("Say something else.")
    page.get_by_label("Edit message").press("Enter")
    done(page, 1)
    assert page.locator(".turn").count() == 2
    assert "Say something else." in page.locator(".turn.user").inner_text()


def test_several_conversations_are_kept_and_saved(page, tmp_path):
    ask(page, "First.")
    done(page, 1)
    page.click("#tab-settings")
    page.get_by_label("System text").fill("Be brief.")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save to file").click()
    download.value.save_as(tmp_path / "chat.json")
    page.get_by_role("button", name="New", exact=True).click()
    assert page.locator(".turn").count() == 0
    assert page.get_by_label("System text").input_value() == ""
    page.get_by_label("Saved conversation").set_input_files(tmp_path / "chat.json")
    until(page, "document.querySelectorAll('.turn').length === 2")
    assert page.get_by_label("System text").input_value() == "Be brief."
    assert page.locator("#chats option").count() == 3
    (tmp_path / "bad.json").write_text("[]")
    page.get_by_label("Saved conversation").set_input_files(tmp_path / "bad.json")
    until(page, "document.querySelector('#chats .hint').textContent.includes('not a saved chat')")


def test_a_model_cannot_write_into_the_page(page):
    found = page.evaluate(
        """async (text) => {
            const { shown } = await import("/page/markdown.js");
            const box = document.createElement("div");
            box.append(shown(text));
            document.querySelector("#turns").append(box);
            await new Promise((resolve) => setTimeout(resolve, 200));
            return {
                tags: [...new Set([...box.querySelectorAll("*")].map((e) => e.tagName.toLowerCase()))].sort(),
                links: [...box.querySelectorAll("a")].map((a) => [a.getAttribute("href"), a.rel]),
                attributes: [...new Set([...box.querySelectorAll("*")].flatMap((e) => e.getAttributeNames()))].sort(),
                hurt: window.hurt ?? null, text: box.textContent,
                isSeen: getComputedStyle(document.body).display !== "none",
            };
        }""",
        HOSTILE,
    )
    assert found["hurt"] is None
    assert found["isSeen"]
    allowed = {
        "a",
        "br",
        "button",
        "code",
        "div",
        "p",
        "pre",
        "strong",
        "table",
        "tbody",
        "td",
        "th",
        "thead",
        "tr",
    }
    assert set(found["tags"]) <= allowed
    assert set(found["attributes"]) <= {
        "aria-label",
        "class",
        "href",
        "rel",
        "role",
        "tabindex",
        "target",
        "type",
    }
    for href, rel in found["links"]:
        assert href is None or href.startswith("https://")
        assert rel == "noopener noreferrer"
    assert "<script>" in found["text"]  # HTML is shown as text
    assert "<b>as written</b>" in found["text"]


def test_reasoning_is_folded_and_calls_are_shown(page):
    page.evaluate(
        """async () => {
            const { Turn } = await import("/page/turns.js");
            const turn = { role: "assistant", text: "Done.", reasoning: "Well <b>then</b>", thinking_s: 2, thought: 7,
                calls: [{ id: "a", name: "weather", words: '{"city": "Rome"}' }] };
            const acts = { result: (call, text) => (window.said = [call.id, text]) };
            document.querySelector("#turns").append(new Turn(turn, acts).element);
        }"""
    )
    assert page.locator("summary").inner_text() == "Reasoning: 7 tokens, 2.0 s"
    assert not page.locator(".thoughts").is_visible()
    page.locator("summary").click()
    assert page.locator(".thoughts").inner_text() == "Well <b>then</b>"
    assert "Calls weather" in page.locator(".call").inner_text()
    assert '"city": "Rome"' in page.locator(".call pre").inner_text()
    page.get_by_label("Result of weather").fill("sun")
    page.get_by_role("button", name="Send result").click()
    assert page.evaluate("window.said") == ["a", "sun"]


CELLS = """() => {
    const canvas = document.querySelector("#map canvas"), pen = canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement), out = [];
    const [layers, experts] = [LAYERS, EXPERTS], isTurned = layers > experts;
    const cell = canvas.width / Math.max(layers, experts);
    const probe = document.createElement("canvas").getContext("2d");
    const colour = (pen, x, y) => pen.getImageData(Math.floor(x), Math.floor(y), 1, 1).data.join();
    const rgb = (name) => {
        probe.fillStyle = style.getPropertyValue(name).trim();
        probe.fillRect(0, 0, 1, 1);
        return colour(probe, 0, 0);
    };
    const bits = Object.fromEntries([[rgb("--absent"), 0], ...[2, 3, 4, 6, 8].map((b) => [rgb(`--bits-${b}`), b])]);
    for (let i = 0; i < layers * experts; i++) {
        const [layer, expert] = [Math.floor(i / experts), i % experts];
        const [x, y] = isTurned ? [layer, expert] : [expert, layer];
        out.push(bits[colour(pen, (x + 0.5) * cell, (y + 0.5) * cell)] ?? -1);
    }
    return out;
}"""


def shown_bits(page, service):
    config = service.model.config
    script = CELLS.replace("LAYERS", str(len(config.moe_layers))).replace(
        "EXPERTS", str(config.num_experts)
    )
    return page.evaluate(script)


def held_bits(service):
    store = service.model.store
    return np.array([0, *store.level_bits])[store.residency.reshape(-1)].tolist()


def test_the_map_shows_what_is_in_memory(page, slow):
    ask(page)
    done(page, 1)
    held = held_bits(slow.service)
    assert 0 in held
    assert max(held) > 0
    end = time.monotonic() + 10
    while shown_bits(page, slow.service) != held:  # once flashes have faded
        assert time.monotonic() < end
        time.sleep(0.1)
    assert f"{sum(b > 0 for b in held)} of {len(held)} experts" in page.locator("#map").inner_text()
    page.locator("#map canvas").focus()
    page.keyboard.press("ArrowRight")
    said = page.locator("#map [role=status]").inner_text()
    assert said.startswith("Layer 0, expert 0: ")
    assert (f"{held[0]} bits" if held[0] else "not in memory") in said


def test_the_slider_changes_the_bits(page, slow):
    page.click("#tab-settings")
    slider = page.get_by_label("Bits of experts")
    until(page, "document.querySelector('output').value === '8 of 8'")
    slider.focus()
    page.keyboard.press("Home")
    until(page, "document.querySelector('#model').textContent.includes('2 bits · lossy')")
    assert slow.service.model.options.bits == 2
    ask(page)
    done(page, 1)
    assert " 2 bits " in page.locator(".figures").inner_text()
    page.get_by_label("Experts for each token").fill("1")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('#settings').textContent.includes('1 experts per token')")
    page.get_by_label("Its options").fill("nope=1")
    page.keyboard.press("Enter")
    page.get_by_text("options: option nope: there is no such").wait_for()
    page.get_by_label("Experts for each token").fill("2")
    page.keyboard.press("Enter")
    slider.focus()
    page.keyboard.press("End")
    until(page, "document.querySelector('#model').textContent.includes('8 bits · exact')")
    assert slow.service.model.notes == ()


def test_who_was_waited_for_is_red(page, slow):
    ask(page)
    # Only half of the experts fit, so that some are missing when wanted: the page shows them while it answers.
    page.wait_for_function(
        """() => {
            const canvas = document.querySelector("#map canvas"), pen = canvas.getContext("2d");
            const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
            return data.some((red, i) => i % 4 === 0 && red > 180 && data[i + 1] < 90 && data[i + 2] < 130);
        }"""
    )
    done(page, 1)
    assert "wanted just now, and was not there" in page.locator("#map .legend").inner_text()


def test_what_levels_cost_stands_beside_the_slider(chrome, tiny_moe, tmp_path, monkeypatch):
    path = measured_file(tiny_moe, tmp_path / "measured.moe")
    monkeypatch.setenv("EDGEMOE_MODELS", str(tmp_path))
    (tmp_path / "other.moe").symlink_to(tiny_moe)
    with running(path) as server, seen(chrome, server.url) as page:
        page.click("#tab-settings")
        until(page, "document.querySelectorAll('#settings tbody tr').length === 3")
        assert "4 bits" in page.locator("#settings tbody").inner_text()
        assert "+1.01 ± 0.10%" in page.locator("#settings tbody").inner_text()
        assert "8 bits" in page.locator("#settings tr.chosen").inner_text()
        slider = page.get_by_label("Bits of experts")
        slider.focus()
        page.keyboard.press("End")  # after the levels: bits per expert
        until(page, "document.querySelector('#model').textContent.includes('auto, at most 4 bits')")
        assert server.service.model.options.bits == "auto"
        page.keyboard.press("Home")
        until(page, "document.querySelector('#settings tr.chosen')?.textContent.includes('2 bits')")
        page.click("#tab-model")
        said = page.locator("#shelf tbody").inner_text()
        assert "other" in said
        assert "8 bits: 100%" in said
        assert "edgemoe serve other --ram" in said


def test_the_bar_adds_up(page, slow):
    until(page, "document.querySelector('#budget .hint').textContent.includes('kernel')")
    shares = page.evaluate(
        "[...document.querySelectorAll('.piece')].map((p) => Number(p.style.flexGrow))"
    )
    assert len(shares) == 7
    assert sum(shares) == pytest.approx(1, abs=0.01)


def test_keys_alone_are_enough(page, slow):
    reached = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.id || document.activeElement.parentElement.id")
        )
    assert {"theme", "tab-now", "chats", "text", "send", "map"} <= reached | {
        page.evaluate("document.activeElement.id")
    }
    page.locator("#tab-now").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#panel-settings").is_visible()
    assert page.evaluate("document.activeElement.id") == "tab-settings"
    page.locator("#text").focus()
    page.keyboard.type("Say it.")
    page.keyboard.press("Enter")
    done(page, 1)


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_part_fits_in_both_themes(chrome, slow, width, theme):
    with seen(
        chrome, slow.url, viewport={"width": width, "height": 780}, color_scheme=theme
    ) as page:
        until(page, "document.querySelector('#model').textContent !== ''")
        ask(page)
        done(page, 1)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (theme == "light")
        tabs = [t for t in page.locator("#tabs button").all() if t.is_visible()]
        assert len(tabs) == (5 if width < 900 else 4)
        for tab in tabs:
            tab.click()
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width
            wide = page.evaluate(
                """() => [...document.querySelectorAll("main > section:not([hidden])")]
                    .filter((s) => s.scrollWidth > s.clientWidth).map((s) => s.id)"""
            )
            assert not wide
            check_axe(page)


def check_axe(page):
    """Runs axe-core if it is installed (scripts/page fetches it)."""
    if "EDGEMOE_AXE" not in os.environ:
        return
    page.evaluate(Path(os.environ["EDGEMOE_AXE"]).read_text() + "; undefined")
    found = page.evaluate(
        "async () => (await axe.run()).violations.map((v) => [v.impact, v.id, v.nodes.map((n) => n.html)])"
    )
    assert [v for v in found if v[0] in ("serious", "critical")] == []


def test_a_key_is_asked_for_once(chrome, tiny_moe):
    with running(tiny_moe, keys=("sesame",)) as server, seen(chrome, server.url) as page:
        page.wait_for_selector("#key[open]")
        page.fill("#key-text", "wrong")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#key-wrong').textContent !== ''")
        page.fill("#key-text", "sesame")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#model').textContent.includes('tiny')")
        page.reload()
        until(page, "document.querySelector('#model').textContent.includes('tiny')")
        ask(page)
        done(page, 1)
        assert page.locator(".turn.assistant .error").count() == 0


def test_what_the_server_refuses_is_said(page):
    ask(page, "x" * 5000)
    page.wait_for_selector(".turn.assistant .error")
    assert "maximum context length" in page.locator(".turn.assistant .error").inner_text()


def test_the_picture_of_the_documentation(chrome):
    """Taken by scripts/page, with the demo model in memory for half of its experts."""
    if "EDGEMOE_PICTURE" not in os.environ:
        pytest.skip("EDGEMOE_PICTURE does not say where to")
    process, port = started(
        "--port", "0", "--ram", "250MiB", "-np", "1", "-c", "512", "-n", "60", "--temp", "0"
    )
    try:
        with seen(
            chrome, f"http://127.0.0.1:{port}", viewport={"width": 1280, "height": 800}
        ) as page:
            for i, text in enumerate(
                ("What is the capital of France?", "List three facts about the sea.")
            ):
                ask(page, text)
                done(page, i + 1)
            page.evaluate("document.activeElement.blur()")
            page.screenshot(path=os.environ["EDGEMOE_PICTURE"])
    finally:
        process.terminate()
        process.stderr.close()
        process.wait()
