"""The labs: their numbers against PyTorch, and the page as a person uses it.

The second half needs Chromium and playwright; where one is missing it is skipped and says so.
"""
import json, re, shutil
import pytest, torch
from tiny_llm import labs
from tiny_llm.files import read_jsonl
from tiny_llm.generate import load_base
from tiny_llm.lora import add_lora_to_model, lora_modules, lora_param_count, match_targets
from tiny_llm.labs import (PALETTE, Panel, adapter_cost, contrast, cut_update, lab_html, lab_page, lora_lab_data, lora_lab_html,
                           lora_lab_widget, matrix_study, pack_int8, relative_errors, shape_only, unpack_int8, update_svd)

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
WIDTHS, MODES, RANKS = (375, 1280), ("light", "dark"), (1, 2, 7, 8, 16, 33, 64)

@pytest.fixture(scope="module")
def data(): return lora_lab_data()

@pytest.fixture(scope="module")
def lab(data): return lora_lab_html(data)

def true_errors(W, ranks):
    "By the definition: the norm of what is left of W."
    U, s, Vt = torch.linalg.svd(W.double(), full_matrices=False)
    return [((W - (U[:, :r] * s[:r]) @ Vt[:r]).norm() / W.double().norm()).item() for r in ranks]

# Python

@pytest.mark.parametrize("shape", [(20, 20), (7, 30), (30, 7), (1, 5)])
def test_relative_errors(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = true_errors(W, range(min(shape) + 1))
    assert torch.allclose(relative_errors(torch.linalg.svdvals(W)), torch.tensor(want, dtype=torch.float64), atol=1e-7)

def test_no_error_of_nothing():
    with pytest.raises(ValueError, match="zero"): relative_errors(torch.zeros(4))
    with pytest.raises(ValueError, match="finite"): relative_errors(torch.tensor([1., torch.nan]))

@pytest.mark.parametrize("shape", [(5, 3), (1, 1), (40, 64)])
def test_packing(shape):
    M = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 3, shape[1])
    assert ((unpack_int8(pack_int8(M)) - M).abs() <= 0.51 * M.abs().amax(0) / 127).all()
    assert unpack_int8(pack_int8(torch.zeros(shape))).eq(0).all()

def test_the_studies_are_of_the_matrices(data):
    for study, (name, about, W) in zip(data["matrices"], labs.lab_matrices(), strict=True):
        assert (study["name"], study["about"]) == (name, about)
        for r, e in zip(RANKS, true_errors(W, RANKS)): assert study["errors"][r] == pytest.approx(e, rel=1e-5, abs=1e-6)

def test_a_study_of_another_shape():
    study = matrix_study(torch.randn(10, 30), max_rank=64)
    assert study["shape"] == [10, 30] and len(study["errors"]) == 11 and study["errors"][10] < 1e-6

@pytest.mark.parametrize("config", labs.SIZES.values(), ids=labs.SIZES)
@pytest.mark.parametrize("r", [1, 64])
@pytest.mark.parametrize("targets", [["attn.W_o"], "all-linear"])
def test_cost_is_what_surgery_adds(config, r, targets):
    cost, model = adapter_cost(shape_only(config), r, targets), shape_only(config)
    assert cost["full_optimizer"] == 8 * sum(p.numel() for p in model.parameters())
    assert cost["trainable"] == lora_param_count(add_lora_to_model(model, r, 16, targets))

def test_cutting_the_update():
    base, tuned = load_base(device="cpu")[0], load_base(device="cpu")[0]
    with torch.no_grad(): [p.add_(torch.randn_like(p) * 0.01) for p in tuned.parameters()]
    svd, layers = update_svd(tuned, base), set(match_targets(base, "all-linear"))
    for n, p in cut_update(base, svd, 256).named_parameters():
        want = tuned if n.removesuffix(".weight") in layers else base
        assert torch.allclose(p, want.get_parameter(n), atol=1e-5), n
    one = cut_update(base, svd, 1).blocks[0].attn.qkv.weight - base.blocks[0].attn.qkv.weight
    assert torch.linalg.matrix_rank(one, rtol=1e-3) == 1

def test_the_log_is_complete():
    log = read_jsonl(labs.LOG)
    assert all(any(s.items() <= row.items() for row in log) for s in labs.RUNS) and len(log) == len(labs.RUNS)
    assert min((r for r in log if r["kind"] == "full"), key=lambda r: r["valid_loss"])["lr"] == labs.KEEP_LR

def test_the_html_is_self_contained(lab, data):
    assert len(lab.encode()) < 300_000
    assert not [c for c in ("$", "`", "://", " src=", " href=", "{{") if c in lab]
    assert lora_lab_html(data) == lab == lab._repr_html_() and len(repr(lab)) < 40

def test_hostile_data_and_scripts():
    inside = "</script><script>alert(1)</script><!-- $x$ `y` {{z}} &amp;"
    html = lab_html("t", "a <b>", [Panel(inside, "function () {}", inside)])
    assert html.count("</script>") == 2 and "$x" not in html and "<b>" not in html
    data = re.search(r'<script type="application/json">(.*?)</script>', html, re.S)[1]
    assert json.loads(data) == [dict(title=inside, data=inside)]
    for js in ("function () { `x`; }", "function () { $(1); }", "function () { fetch('https://x'); }"):
        with pytest.raises(ValueError, match="script"): lab_html("t", "t", [Panel("a", js, None)])

def test_the_widget_by_its_traits(data):
    model, tok = load_base(device="cpu")
    app = lora_lab_widget(model, tok, labs.lab_examples()[0][:16])
    page, train = app.compress, app.train
    for study in data["matrices"]:
        page.matrix.value = study["name"]
        for r in (2, 64):
            page.rank.value = r
            assert page.error == pytest.approx(study["errors"][r], abs=1e-5) and f"{page.error:.1%}" in page.numbers.value
    for rank in (3, 5):  # a second training starts anew
        train.rank.value, train.seconds.value = rank, 1
        train.start.click()
        assert {m.r for m in lora_modules(model).values()} == {rank} and train.losses and "svg" in train.curve.value
    assert page.matrix.value == "Just trained" and page.matrix.options.count("Just trained") == 1
    assert not train.start.disabled

# The page

@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium: pytest.skip("no chromium here")
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=FLAGS)
        yield b
        b.close()

@pytest.fixture
def open_page(browser, tmp_path):
    "open_page(html, width, mode): the page; at the end it must have logged nothing and asked for nothing."
    said, contexts = [], []
    def go(html, width=1280, mode="light"):
        (file := tmp_path / "lab.html").write_text(html, encoding="utf-8")
        contexts.append(c := browser.new_context(viewport=dict(width=width, height=800), color_scheme=mode))
        page = c.new_page()
        page.on("console", lambda m: "willReadFrequently" in m.text or said.append(m.text)) # that one is about the test's own reading
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("request", lambda r: r.url == file.as_uri() or said.append(r.url))
        page.goto(file.as_uri())
        return page
    yield go
    for c in contexts: c.close()
    assert not said

@pytest.fixture
def page(open_page, lab): return open_page(lab_page(lab, "LoRA Lab"))

def numbers(page, panel=0): return page.locator("[role=tabpanel]").nth(panel).locator(".tll-numbers strong").all_text_contents()
def shown_error(page):
    text = numbers(page)[0]
    assert text.endswith(" %")
    return text, float(text[:-2]) / 100
def equal_to_3_digits(text, shown, true):
    if true < 5e-6: return text == "0 %"
    return len(re.sub(r"^0\.?0*|\D", "", text)) == 3 and abs(shown - true) <= 0.5 * 10 ** -(len(text[:-2].partition(".")[2]) + 2) * 1.001

def test_displayed_errors_are_pythons(page):
    for i, (name, _, W) in enumerate(labs.lab_matrices()):
        page.get_by_label("Matrix").select_option(label=name)
        for r, true in zip(RANKS, true_errors(W, RANKS)):
            page.get_by_label("Rank r").first.fill(str(r))
            text, shown = shown_error(page)
            assert equal_to_3_digits(text, shown, true), (name, r, text, true)
            assert page.locator(".tll-now td").all_text_contents() == [name, text]
            assert numbers(page)[1] == f"{512 * r:,} of 65,536"

def test_slider_by_mouse(page):
    slider = page.get_by_label("Rank r").first
    box = slider.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.click(box["x"] + box["width"] * 0.75, y)
    first, error = int(slider.input_value()), shown_error(page)[1]
    assert 44 <= first <= 52
    page.mouse.move(box["x"] + box["width"] * 0.75, y)
    page.mouse.down(); page.mouse.move(box["x"] + box["width"] * 0.25, y, steps=5); page.mouse.up()
    assert 12 <= int(slider.input_value()) <= 20 and shown_error(page)[1] > error

def test_slider_by_keyboard(page):
    slider = page.get_by_label("Rank r").first
    slider.focus()
    seen = []
    for key in ("ArrowRight", "ArrowLeft", "Home", "End"):
        page.keyboard.press(key)
        seen.append((int(slider.input_value()), page.locator("output").first.text_content()))
    assert seen == [(9, "9"), (8, "8"), (1, "1"), (64, "64")]
    assert slider.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"

def test_everything_is_reached_by_tab(page):
    seen = []
    for _ in range(4):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.getAttribute('role') || document.activeElement.type"))
    assert seen[:3] == ["tab", "select-one", "range"]

def test_tabs_by_keyboard(page):
    tabs, panels = page.get_by_role("tab"), page.locator("[role=tabpanel]")
    tabs.first.focus()
    for key, now in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowRight", 0), ("ArrowLeft", 2), ("Home", 0), ("End", 2)):
        page.keyboard.press(key)
        assert [t.get_attribute("aria-selected") for t in tabs.all()] == [str(i == now).lower() for i in range(3)]
        assert [p.is_visible() for p in panels.all()] == [i == now for i in range(3)]
        assert page.evaluate("document.activeElement.textContent") == tabs.nth(now).text_content()
        assert panels.nth(now).get_attribute("aria-labelledby") == tabs.nth(now).get_attribute("id")

def test_the_heatmap_is_the_product(page, data):
    study = data["matrices"][0]
    for r in (1, 8, 64):
        page.get_by_label("Rank r").first.fill(str(r))
        pixels = page.evaluate("""() => { var c = document.querySelectorAll("canvas")[1];
            return Array.from(c.getContext("2d").getImageData(0, 0, c.width, c.height).data); }""")
        M = unpack_int8(study["us"])[:, :r] @ unpack_int8(study["v"])[:, :r].T
        t = (M / study["limit"]).clamp(-1, 1).flatten()[:, None]
        low, zero, high = (torch.tensor([int(PALETTE["light"][k][i:i + 2], 16) for i in (1, 3, 5)]) for k in ("low", "zero", "high"))
        want = zero + t.abs() * (torch.where(t < 0, low, high) - zero)
        assert (torch.tensor(pixels).view(-1, 4)[:, :3] - want).abs().max() <= 1.5

def test_count_is_pythons(page):
    page.get_by_role("tab", name="Count").click()
    panel = page.locator("[role=tabpanel]").nth(1)
    for name, config in labs.SIZES.items():
        panel.get_by_label("Model").select_option(label=name)
        for r, alpha, target in ((1, 2, "mlp.up"), (64, 100, "mlp.down")):
            panel.get_by_label("Rank r").fill(str(r)); panel.get_by_label("alpha").fill(str(alpha))
            panel.get_by_label(target).check()
            chosen = [b.get_attribute("value") for b in panel.locator("input:checked").all()]
            cost = adapter_cost(shape_only(config), r, chosen)
            trained, share, scaling = numbers(page, 1)
            assert trained == f"{cost['trainable']:,}" and float(scaling) == pytest.approx(alpha / r, rel=5e-3)
            assert float(share[:-2]) / 100 == pytest.approx(cost["ratio"], rel=5.1e-3)
    for name in chosen: panel.get_by_label(name).uncheck()
    assert numbers(page, 1)[0] == "0"

def test_answers_are_the_logs(page):
    page.get_by_role("tab", name="Answers").click()
    log = read_jsonl(labs.LOG)
    for i, prompt in enumerate(labs.ASK):
        page.get_by_label("Prompt").select_option(label=prompt)
        said = page.locator(".tll-say").all_text_contents()
        assert len(said) == 7
        for r in (1, 2, 4, 8, 16):
            row = next(x for x in log if x["kind"] == "lora" and x["r"] == r)
            card = page.locator("article", has=page.locator("strong", has_text=re.compile(f"^Rank {r}" + "$")))
            assert card.locator(".tll-say").text_content() == row["answers"][i] and f"{row['valid_loss']:.3f}" in card.text_content()

@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("mode", MODES)
def test_fits_and_reads_well(open_page, lab, width, mode):
    page = open_page(lab_page(lab), width, mode)
    assert page.locator(".tll-lab").get_attribute("data-theme") == mode
    for i in range(3):
        page.get_by_role("tab").nth(i).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = page.evaluate("""() => Array.from(document.querySelectorAll(".tll-lab *")).filter(function (e) {
            return e.getBoundingClientRect().right > innerWidth; }).map(function (e) { return e.outerHTML.slice(0, 80); })""")
        assert not wide
        small = page.evaluate("""() => Array.from(document.querySelectorAll(".tll-lab button, .tll-lab select, .tll-lab input[type=range]"))
            .filter(function (e) { var h = e.getBoundingClientRect().height; return h && h < 44; }).length""")
        assert small == 0
        colours = page.evaluate("""() => { var out = [];
            document.querySelectorAll(".tll-lab *").forEach(function (e) {
              var own = Array.from(e.childNodes).some(function (n) { return n.nodeType === 3 && n.textContent.trim(); }), g = e, s = getComputedStyle(e);
              if (!own || !e.getClientRects().length || e.closest("option")) return;
              while (getComputedStyle(g).backgroundColor === "rgba(0, 0, 0, 0)") g = g.parentElement;
              out.push([e.closest("svg") ? s.fill : s.color, getComputedStyle(g).backgroundColor, e.textContent.slice(0, 30)]);
            }); return out; }""")
        as_hex = lambda c: "#" + "".join(f"{int(v):02x}" for v in re.findall(r"\d+", c)[:3])
        assert len(colours) > 8 and not [c for c in colours if contrast(as_hex(c[0]), as_hex(c[1])) < 4.5]

@pytest.mark.parametrize("where, on, off", [("body", "quarto-dark", "quarto-light"), ("documentElement", "quarto-dark", "")])
def test_follows_the_page(open_page, lab, where, on, off):
    page = open_page(lab_page(lab).replace("</head>", "<style>body{background:#fff}</style></head>"))
    theme = lambda name: (page.evaluate(f"document.{where}.className = '{name}'"), page.wait_for_timeout(50),
                          page.locator(".tll-lab").get_attribute("data-theme"))[-1]
    assert (theme(on), theme(off), theme(on)) == ("dark", "light", "dark")

def test_two_labs_on_one_page(open_page, lab):
    other = lab_html("other", "Other", [Panel("One", "function (root, data, kit) { kit.slider(root, {label: 'n', min: 0, max: 9, value: data, on: function () {}}); }", 4)])
    page = open_page(lab_page(lab + "\n" + lab + "\n" + other).replace("<body", "<script>var before = Object.keys(window).concat('before');</script><body"))
    assert page.evaluate("Object.keys(window).filter(function (k) { return !before.includes(k); })") == []
    ids = page.evaluate("Array.from(document.querySelectorAll('[id]')).map(function (e) { return e.id; })")
    assert len(ids) == len(set(ids)) > 10 and page.locator(".tll-lab[data-ready]").count() == 3
    page.get_by_label("Rank r").first.fill("64")
    assert numbers(page)[0] != numbers(page, 3)[0]

def test_without_scripts(browser, lab, tmp_path, data):
    (file := tmp_path / "lab.html").write_text(lab_page(lab), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    assert f"{data['matrices'][-1]['errors'][8]:.1%}" in page.locator(".tll-fallback").inner_text()
    context.close()
