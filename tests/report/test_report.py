"""The page: whole, escaped, alone; and loaded by a browser without a complaint."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from scipy import stats

from vbdl.cli import main
from vbdl.report import png, significance, svg
from vbdl.report.page import number, render, write
from vbdl.report.run import StoredRun, read_results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tags(HTMLParser):
    """Every tag and attribute of a page, and its visible text."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def speed_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("speed") / "speed.jsonl"
    line = {"workload": "W1", "batch": 32, "wall_ratio": 1.0, "first_call_s": 0.1, "machine": {"cpu": "a <b>processor"}}
    lines = [line | {"contender": "loop", "wall_s": 0.02}, line | {"contender": "vbdl", "wall_s": 0.004}]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"workl')
    return path


@pytest.fixture(scope="module")
def page(stored, speed_file):
    cell = {"axis": "draws", "method": "mc-dropout"}
    lines = [
        cell | {"quantity": quantity, "size": size, "value": size * unit}
        for quantity, unit in (("seconds", 1e-4), ("bytes", 2**20))
        for size in (8, 32, 128)
    ]
    (stored / "scaling.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return render(StoredRun.read(stored), speed_file)


@pytest.fixture(scope="module")
def parsed(page):
    tags = Tags()
    tags.feed(page)
    return tags


def test_every_result_is_on_the_page(parsed, stored):
    for r in read_results(stored):
        assert r["dataset"] in parsed.text and r["method"] in parsed.text
        for score in r["scores"].values():
            assert number(score["value"]) in parsed.text
    for said in ("Reliability", "Risk against coverage", "Most uncertain test rows", "In and out of distribution"):
        assert said in parsed.text
    for said in (
        "Against published numbers",
        "MC dropout 2018",
        "Deep Ensembles 2017",
        "Cost against draws",
        "Memory against draws",
        "W1",
    ):
        assert said in parsed.text
    assert parsed.tags.count("svg") >= 3 * 2 + 3 * 2 + 1


def test_the_page_needs_nothing_else(page, parsed):
    outside = [a for a in parsed.attributes if a[1] in ("src", "href") and not re.match(r"data:|#", a[2] or "")]
    assert not outside and "@import" not in page and "url(" not in page
    assert "script" not in parsed.tags and "link" in parsed.tags
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page


def test_names_from_data_are_escaped(page, parsed):
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not [a for a in parsed.attributes if a[1].startswith("on")]
    assert "img" in parsed.tags and all(
        a[2].startswith("data:") for a in parsed.attributes if a[0] == "img" and a[1] == "src"
    )
    assert page.count("</style>") == 1 and "a &lt;b&gt;processor" in page


def test_images_of_cases_are_the_data(stored):
    from PIL import Image
    from sklearn.datasets import load_digits

    tensors, about = StoredRun.read(stored).rows(next(r for r in read_results(stored) if r["dataset"] == "digits"))
    assert about["image"] and about["ood"] == ["turned by 90 degrees", "noise"]
    picture = tensors["case.input"][0]
    decoded = Image.open(io.BytesIO(base64.b64decode(png.data_url(picture).partition(",")[2])))
    assert torch.equal(torch.frombuffer(bytearray(decoded.tobytes()), dtype=torch.uint8).view(8, 8), picture[..., 0])
    images = torch.from_numpy(load_digits().images / 16 * 255).round().to(torch.uint8)
    assert (images == picture[..., 0]).flatten(1).all(1).any(), "a digit of the set"
    worst = tensors["total"][0].argsort(descending=True)[:12]
    assert torch.equal(worst.int(), tensors["case.row"])
    color = torch.randint(256, (4, 5, 3), dtype=torch.uint8)
    decoded = Image.open(io.BytesIO(base64.b64decode(png.data_url(color).partition(",")[2])))
    assert decoded.size == (5, 4) and torch.equal(
        torch.frombuffer(bytearray(decoded.tobytes()), dtype=torch.uint8).view(4, 5, 3), color
    )


def test_a_quick_look_and_what_is_missing_are_said(stored, page, tmp_path):
    assert "A quick look: 5 % of the epochs" in page
    copy = tmp_path / "copy"
    shutil.copytree(stored, copy)
    lines = (copy / "results.jsonl").read_text().splitlines()
    failed = json.loads(lines[1]) | {"error": "the loss became nan"}
    (copy / "results.jsonl").write_text("\n".join([lines[0], json.dumps(failed), *lines[3:]]) + "\n")
    said = Tags()
    said.feed(render(StoredRun.read(copy)))
    assert "Not there yet: measured with deep-ensemble, measured with linear" in " ".join(said.text.split())
    assert "Failed: measured with deep-ensemble: the loss became nan" in said.text
    shutil.rmtree(copy / "rows")
    assert "accuracy" in render(StoredRun.read(copy)), "scores without the rows behind them"


def test_the_command_writes_the_page(stored, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(stored), "--out", str(out)]) == 0
    assert "page.html" in capsys.readouterr().out and out.read_text().startswith("<!doctype html>")
    for arguments in ([str(tmp_path / "none")], [str(tmp_path)], [str(stored), "--speed", str(tmp_path / "none")]):
        assert main(["report", *arguments]) == 1
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_worse_result_says_what_differs(parsed, stored):
    """The stored likelihood of 2018 is 0, 0.1, ... 0.4 here, which no regression in these units reaches."""
    said = " ".join(parsed.text.split())
    assert "measured, mc-dropout against MC dropout 2018: this run trained 400 epochs" in said
    assert "the column of 2018 4000 epochs" in said
    assert "measured, mc-dropout against MC dropout 2016: " in said and "linear against" not in said


# -- significance


def score(values, better="higher"):
    t = torch.tensor(values, dtype=torch.float64)
    error = float(t.std()) / len(values) ** 0.5
    return {"value": float(t.mean()), "standard_error": error, "better": better, "per_split": list(values)}


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_column_with_splits_is_tested_in_pairs(better):
    generator = torch.Generator().manual_seed(0)
    theirs = torch.randn(20, generator=generator, dtype=torch.float64)
    ours = theirs + 0.3 + 0.2 * torch.randn(20, generator=generator, dtype=torch.float64)
    column = {"mean": float(theirs.mean()), "standard_error": 0.2, "per_split": theirs.tolist()}
    found = significance.against_published(score(ours.tolist(), better), column)
    test = stats.ttest_rel(ours.numpy(), theirs.numpy())
    assert (
        found.paired
        and found.p_value == pytest.approx(test.pvalue)
        and abs(found.errors) == pytest.approx(test.statistic)
    )
    assert found.word == ("better" if better == "higher" else "worse")
    assert found.difference == pytest.approx(float((ours - theirs).mean()))


@pytest.mark.parametrize(
    "shift, word", [(0.0, "no difference found"), (0.15, "better"), (-0.15, "worse"), (0.1, "no difference found")]
)
def test_a_column_without_splits_is_held_to_two_standard_errors(shift, word):
    ours = score([1 + shift, 1.1 + shift, 0.9 + shift, 1.0 + shift])
    column = {"mean": 1.0, "standard_error": 0.05, "per_split": []}
    found = significance.against_published(ours, column)
    error = (ours["standard_error"] ** 2 + 0.05**2) ** 0.5
    assert found.word == word and found.errors == pytest.approx(shift / error)


def test_nearer_to_a_nominal_value_is_better():
    found = significance.between([0.9, 0.91, 0.89, 0.9], [0.8, 0.99, 0.8, 0.99], "0.9", alpha=0.05)
    assert found is not None and found.word == "better"
    assert (
        significance.between([1.0], [2.0], "higher") is None
        and significance.between([1, 2], [1, 2, 3], "lower") is None
    )


@pytest.mark.parametrize("ends", [(0.0, 1.0), (0.0, 0.073), (-3.0, 1200.0), (5.0, 5.0)])
def test_ticks_are_few_and_inside(ends):
    found = svg.ticks(ends)
    assert 1 <= len(found) <= 7 and all(ends[0] - 1e-9 <= t <= ends[1] + 1e-9 for t in found)
    assert svg.ticks((1, 1000), log=True) == [1, 10, 100, 1000]


def test_numbers_are_as_long_as_they_mean():
    assert [number(v) for v in (None, 0.0, 1e-17, 0.0123456, 12.3456, 123456.0)] == [
        "-",
        "0",
        "0",
        "0.0123",
        "12.3",
        "123,456",
    ]


# -- a real browser


def chromium(*arguments):
    return subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--virtual-time-budget=3000",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


def complaints(done):
    return [text for text in done.stderr.splitlines() if "CONSOLE" in text]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_loads_the_page_without_a_complaint(stored, speed_file, tmp_path):
    path = write(stored, tmp_path / "page.html", speed_file)
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('seen')</script>")
    assert complaints(chromium(profile, "--dump-dom", f"file://{bad}")), "an error on the console would be noticed"
    done = chromium(profile, "--dump-dom", f"file://{path}")
    assert done.returncode == 0 and "Benchmark run" in done.stdout and done.stdout.rstrip().endswith("</html>")
    assert complaints(done) == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_screen(width, stored, speed_file, tmp_path):
    """Tables scroll inside their boxes; the page itself does not, with every part of it open."""
    text = render(StoredRun.read(stored), speed_file).replace("<details", "<details open")
    measure = "document.title = document.documentElement.scrollWidth + ' of ' + innerWidth"
    inside = json.dumps(text.replace("</body>", f"<script>{measure}</script></body>")).replace("</", "<\\/")
    (tmp_path / "outer.html").write_text(
        f'<iframe id="f" style="border:0" width="{width}" height="800"></iframe><script>f.srcdoc = {inside};'
        f"f.onload = () => document.title = f.contentDocument.title</script>"
    )
    done = chromium(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'outer.html'}")
    found = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert found is not None, done.stderr[-500:]
    assert int(found[2]) == width and int(found[1]) <= width


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_light_and_dark_are_drawn(stored, tmp_path):
    from PIL import Image

    path = write(stored, tmp_path / "page.html")
    shades = []
    for scheme in (0, 1):  # blink's dark and light
        shot = tmp_path / f"{scheme}.png"
        chromium(
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=390,800",
            f"--screenshot={shot}",
            f"file://{path}",
        )
        shades.append(Image.open(shot).convert("L").getpixel((2, 2)))
    assert shades[0] < 60 < 200 < shades[1]
