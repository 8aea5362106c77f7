"""Folders of the Hugging Face Hub: their layout, card, the way there and back; CLIPs of other libraries.

The Hub is a server on this machine that speaks its protocol; huggingface_hub itself sends and fetches."""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, randn

from engine import hub
from engine.backbone import activation_of, import_clip, load_clip
from engine.checkpoint import (
    find_file,
    from_pretrained,
    load_checkpoint,
    main,
    open_checkpoint,
    push_to_hub,
    save_checkpoint,
    save_run,
)
from engine.config import plain, preset
from engine.files import ModelError
from model import TMASS

TEXTS, VIDEOS, FRAMES, WORDS, CONTEXT = 5, 3, 4, 90, 11
VAL = {"t2v": {"R@1": 31.25, "MdR": 2.0}, "v2t": {"R@1": 33.75, "MdR": 3.0}}
TEST = {"t2v": {"R@1": 41.125, "MnR": 5.5}, "v2t": {"R@1": 43.875, "MnR": 6.5}}


def make_clip(seed: int = 0) -> torch.nn.Module:
    """A random CLIP of OpenAI's class whose files take no time."""
    torch.manual_seed(seed)
    vision = dict(image_resolution=32, vision_layers=3, vision_width=128, vision_patch_size=8)
    text = dict(context_length=CONTEXT, vocab_size=WORDS, transformer_width=64, transformer_heads=1)
    return import_clip().model.CLIP(embed_dim=24, **vision, **text, transformer_layers=2).float().eval()


def make_model(seed: int = 0, **options) -> TMASS:
    return TMASS(make_clip(seed), **{"num_frames": FRAMES, **options}).eval()


def features(model: TMASS) -> torch.Tensor:
    """The scores' ingredients: t, f, and R of every pair, in one row."""
    tokens = torch.randint(1, WORDS, (TEXTS, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        text, frames = model.encode_text(tokens), model.encode_frames(randn(VIDEOS, FRAMES, 3, 32, 32))
        video = model.fusion(text, frames)
        radius = model.radius(text, frames, video)
    return torch.cat([x.flatten() for x in (text, frames, video, radius)])


def make_run(folder: Path, model: TMASS, results: bool = True, **changes) -> Path:
    """A run as train.py and evaluate.py leave it."""
    config = plain(preset("msrvtt", "tmass")) | {
        "seed": 3,
        "annotations": "/home/me/lists",
        "out": "/home/me",
    }
    save_checkpoint(folder / "best.pt", model, config=config, step=77, val=VAL, commit="abc1234", data="ff")
    data = {"train": 640, "val": ["a", "b"], "skipped": {"c": "/home/me/c.mp4 cannot be read"}}
    (folder / "data.json").write_text(json.dumps(data))
    content = dict(name="T-MASS, M = 20", dataset="msrvtt", split="test", texts=1000, videos=997, missing=3)
    content |= dict(
        M=20, prior={"prior": "normal", "std": 1.0}, seed=9, metrics=TEST, machine="x86_64, a CPU"
    )
    content["config"] = dict(captions="all", score="sampled", noise="shared", dsl="none", amp="off")
    content["config"] |= dict(protocol="paper", data="/home/me/data")
    content["sha256"] = hashlib.sha256((folder / "best.pt").read_bytes()).hexdigest()
    if results:
        (folder / "results.json").write_text(json.dumps(content | changes))
    return folder


# ---- the folder


def mixin():
    """A class of PyTorchModelHubMixin for our folders: config.json has all of its arguments."""
    package = pytest.importorskip("huggingface_hub")

    class Mixed(package.PyTorchModelHubMixin, TMASS, library_name="tmass"):
        def __init__(self, clip: dict, arguments: dict):
            super().__init__(import_clip().model.CLIP(**clip), **arguments)

    return Mixed


def test_a_class_of_the_hubs_mixin_opens_our_folder_and_we_open_its(tmp_path):
    model, ours, theirs = make_model(), tmp_path / "ours", tmp_path / "theirs"
    model.save_pretrained(ours)
    opened = mixin().from_pretrained(ours, strict=True).eval()  # which version 1.0 of the Hub leaves out
    assert torch.allclose(features(opened), features(model), atol=1e-6)
    opened.save_pretrained(theirs)
    for folder in (ours, theirs):
        assert sorted(path.name for path in folder.iterdir()) == sorted(hub.FILES)
        assert torch.allclose(features(TMASS.from_pretrained(folder)), features(model), atol=1e-6)


@pytest.mark.parametrize("options", [dict(radius="joint"), dict(radius="scalar", heads=2, num_frames=FRAMES)])
def test_a_saved_run_scores_as_its_checkpoint(tmp_path, options):
    model = make_model(**options)
    save_run(make_run(tmp_path, model), tmp_path / "folder")
    opened, trained, file = open_checkpoint(tmp_path / "folder")
    assert torch.equal(features(opened), features(load_checkpoint(tmp_path / "best.pt")))
    assert opened.arguments == model.arguments and trained["dataset"] == "msrvtt" and trained["seed"] == 3
    assert file == tmp_path / "folder" / "model.safetensors"


def test_nothing_in_a_saved_run_names_a_path_of_the_machine(tmp_path):
    model, folder = make_model(), tmp_path / "folder"
    save_run(make_run(tmp_path, model), folder)
    for name in ("README.md", "config.json"):
        assert "/home" not in (folder / name).read_text()
    files = {"arch": "/home/me/mine.pt", "weights": "/home/me/x/clip.bin", "dataset": "csv"}
    assert hub.public_config(files) == {"arch": "mine.pt", "weights": "clip.bin", "dataset": "csv"}
    known = {"arch": "ViT-B/32", "weights": None, "tiny_clip": "12"}
    assert hub.public_config({**known, "videos": "/v", "data": "d", "device": "cuda:1"}) == known


# ---- the card


def card_of(folder: Path):
    """The card as huggingface_hub reads it."""
    return pytest.importorskip("huggingface_hub").ModelCard.load(folder / "README.md")


def test_the_card_has_metrics_split_seeds_config_licence_citation_and_library(tmp_path):
    save_run(make_run(tmp_path, make_model(radius="joint")), tmp_path / "folder")
    card = card_of(tmp_path / "folder")
    data = card.data.to_dict()
    assert (data["library_name"], data["license"]) == ("tmass", "mit")
    assert data["base_model"] == "openai/clip-vit-base-patch32"
    found = {(r.task_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found[("text-to-video retrieval", "R@1")] == 41.12
    assert found[("video-to-text retrieval", "MnR")] == 6.5
    assert {(r.dataset_name, r.dataset_split) for r in card.data.eval_results} == {("msrvtt", "test")}
    for line in [
        "# T-MASS, R joint, trained on msrvtt", "| T-MASS, M = 20 |   41.1 |    5.5 |",
        "| validation    |   31.2 |    2.0 |", "* seed: 3", "* commit: abc1234", "* step: 77",
        "head_lr: 3e-05", "* clips: 640 training, 2 validation, 1 unreadable", "* machine: not recorded",
        "Machine: x86_64, a CPU.", "radius: linear",
    ]:  # fmt: skip
        assert f"\n{line}\n" in card.content, line
    sizes = "1000 captions, 997 videos, 3 videos left out; M = 20 draws (noise normal, std 1; seed 9)"
    assert sizes in card.text


def test_the_card_cites_the_paper_as_citation_cff_does(tmp_path):
    make_model().save_pretrained(tmp_path)
    cited, cff = (tmp_path / "README.md").read_text(), (ROOT / "CITATION.cff").read_text()
    for family, given in re.findall(r"family-names: (\w+), given-names: (\w+)", cff):
        assert f"{family}, {given}" in cited
    for name in ("start", "end"):
        assert re.search(rf"{name}: (\d+)", cff)[1] in cited
    assert re.search(r'preferred-citation:.*?title: "(.*?)"', cff, re.S)[1] in cited


@pytest.mark.parametrize("changes, note", [
    (dict(sha256="0" * 64), "of other weights than best.pt"),
    (dict(config=dict(protocol="released")), "of the protocol that leaks"),
])  # fmt: skip
def test_results_of_other_weights_or_of_the_leak_are_not_in_the_card(tmp_path, changes, note):
    with pytest.warns(UserWarning, match=note):
        assert save_run(make_run(tmp_path, make_model(), **changes), tmp_path / "folder") is None
    text = (tmp_path / "folder" / "README.md").read_text()
    assert "\nNot evaluated: no results of evaluate.py for these weights.\n" in text
    assert "41.1" not in text and "model-index" not in text and "not a test result" in text


def test_a_model_of_which_nothing_is_recorded_says_so(tmp_path):
    make_model(radius="none", fusion="mean").save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.data.license == "unknown" and "base_model" not in card.data.to_dict()
    assert "\n## Results\n\nNot evaluated" in card.text and "\n## Training\n\nNot recorded." in card.text
    assert "\n# mean pooling\n" in card.text and "These weights: not given." in card.text


@pytest.mark.parametrize("config, given, expected", [
    ({"arch": "tiny"}, None, "mit"), ({"arch": "ViT-L/14@336px"}, None, "mit"),
    ({"arch": "tiny", "weights": "clip.pt"}, None, "unknown"), ({"arch": "mine.pt"}, None, "unknown"),
    ({"released": True}, None, "unknown"), ({"arch": "mine.pt"}, "cc-by-nc-4.0", "cc-by-nc-4.0"),
])  # fmt: skip
def test_the_licence_is_mit_only_for_weights_that_started_from_a_clip_under_mit(config, given, expected):
    content = {"arguments": make_model().arguments, "config": config, "license": given}
    assert f'\nlicense: "{expected}"\n' in hub.model_card(content, "T-MASS")


def test_a_card_is_written_anew_until_its_mark_is_removed(tmp_path):
    make_run(tmp_path, make_model(), results=False)
    card, folder = tmp_path / "folder" / "README.md", tmp_path / "folder"
    save_run(tmp_path, folder)
    card.write_text(card.read_text().replace("Not evaluated", "95.0"))
    save_run(tmp_path, folder)
    assert "95.0" not in card.read_text()
    mine = card.read_text().replace(hub.MARK, "") + "My words.\n"
    card.write_text(mine)
    save_run(tmp_path, folder)
    assert card.read_text() == mine
    save_run(folder, tmp_path / "copy")  # it goes with the model
    assert (tmp_path / "copy" / "README.md").read_text() == mine


def test_a_saved_folder_keeps_what_was_recorded_when_it_is_saved_again(tmp_path):
    save_run(make_run(tmp_path, make_model()), tmp_path / "one", license="apache-2.0")
    assert save_run(tmp_path / "one", tmp_path / "two")["metrics"] == TEST
    one, two = (tmp_path / name / "README.md" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_damaged_records_give_one_sentence(tmp_path):
    for name, text in [("results.json", "{"), ("results.json", "[]"), ("data.json", '{"train": 3}')]:
        make_run(tmp_path, make_model())
        (tmp_path / name).write_text(text)
        with pytest.raises(ModelError, match=rf"{name} is not as .* writes it \(.+\): .* remove it") as error:
            save_run(tmp_path, tmp_path / "folder")
        assert "\n" not in str(error.value)


# ---- to the Hub and back


class FakeHub(BaseHTTPRequestHandler):
    """The parts of the Hub's protocol that an upload and a download need. Models are lists of commits."""

    models: dict[str, list[dict[str, bytes]]]

    def log_message(self, *_) -> None:
        pass

    def answer(self, content=b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.models.setdefault(name, [])
            return self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        _, _, _, user, name, action, *_ = path.split("/")
        if action == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self.answer({"files": modes})
        rows = [json.loads(line) for line in body.splitlines()]
        files = [row["value"] for row in rows if row["key"] == "file"]
        commits = self.models[f"{user}/{name}"]
        commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
        sha = f"{len(commits):040x}"
        url = f"https://huggingface.co/{user}/{name}/commit/{sha}"
        return self.answer({"commitOid": sha, "commitUrl": url})

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if len(parts) == 4 and parts[1] == "models":
            parts += ["revision", "main"]
        if len(parts) < 5:  # what huggingface_hub also asks for, and does not need
            return self.answer(b"", 404)
        user, name, action, revision, *file = parts[2:] if parts[0] == "api" else parts
        commits = self.models.get(f"{user}/{name}")
        if commits is None:
            return self.answer(b"", 404, X_Error_Code="RepoNotFound")
        number = len(commits) if revision == "main" else int(revision, 16) if len(revision) == 40 else 99
        if number > len(commits):
            return self.answer(b"", 404, X_Error_Code="RevisionNotFound")
        files, sha = [{}, *commits][number], f"{number:040x}"
        oid = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
        if action == "revision":
            siblings = [{"rfilename": x} for x in files]
            return self.answer({"id": f"{user}/{name}", "sha": sha, "siblings": siblings})
        if action == "tree":
            entries = [{"type": "file", "path": x, "oid": oid[x], "size": len(files[x])} for x in files]
            return self.answer(entries)
        return self.answer(files[file[0]], ETag=f'"{oid[file[0]]}"', X_Repo_Commit=sha)

    do_HEAD = do_GET


@pytest.fixture
def fake_hub(monkeypatch, tmp_path) -> Iterator[dict[str, list[dict[str, bytes]]]]:
    """A Hub on this machine, without models. huggingface_hub sends to it and fetches from it."""
    constants = pytest.importorskip("huggingface_hub.constants")
    handler = type("Handler", (FakeHub,), {"models": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield handler.models
    server.shutdown()
    server.server_close()


def test_a_pushed_model_comes_back_by_its_name_and_an_older_one_by_its_revision(fake_hub, tmp_path):
    first, second = make_model(seed=1), make_model(seed=2, radius="joint")
    url = push_to_hub(first, "user/name", config={"dataset": "csv", "videos": "/home/me"})
    assert url == f"https://huggingface.co/user/name/commit/{1:040x}"
    second.push_to_hub("user/name")
    assert [sorted(commit) for commit in fake_hub["user/name"]] == [sorted(hub.FILES)] * 2
    assert torch.allclose(features(TMASS.from_pretrained("user/name")), features(second), atol=1e-6)
    older = TMASS.from_pretrained("user/name", revision=f"{1:040x}")
    assert torch.allclose(features(older), features(first), atol=1e-6)
    assert older.arguments["radius"] == "linear"


def test_the_command_pushes_a_run_with_its_card(fake_hub, tmp_path, capsys):
    main(["push", str(make_run(tmp_path, make_model())), "user/run", "--license", "cc-by-4.0"])
    assert capsys.readouterr().out == f"https://huggingface.co/user/run/commit/{1:040x}\n"
    (commit,) = fake_hub["user/run"]
    card = commit["README.md"].decode()
    assert "| T-MASS, M = 20 |   41.1 |" in card and '\nlicense: "cc-by-4.0"\n' in card
    assert "/home" not in card


def test_what_the_hub_refuses_is_one_sentence(fake_hub, monkeypatch):
    push_to_hub(make_model(), "user/name")
    from_pretrained("user/name")
    for name, revision in [("user/none", None), ("user/name", "v9")]:
        says = rf"{name} is no folder here, and could not be fetched from the Hub \(.+\): check the name"
        with pytest.raises(ModelError, match=says) as error:
            from_pretrained(name, revision)
        assert "\n" not in str(error.value)
    constants = sys.modules["huggingface_hub.constants"]
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ModelError, match=r"user/name could not be sent to the Hub \(.+\): check") as error:
        push_to_hub(make_model(), "user/name")
    assert "\n" not in str(error.value)
    assert features(from_pretrained("user/name")).isfinite().all()  # out of the cache


def test_the_command_saves_a_run_or_says_in_one_sentence_why_not(tmp_path, capsys):
    main(["save", str(make_run(tmp_path, make_model())), str(tmp_path / "folder")])
    assert capsys.readouterr().out == f"written: {tmp_path / 'folder'} (results: T-MASS, M = 20)\n"
    make_run(tmp_path, make_model(), sha256="0")
    main(["save", str(tmp_path), str(tmp_path / "other")])
    out, err = capsys.readouterr()
    assert out == f"written: {tmp_path / 'other'} (not evaluated)\n" and err.startswith("note: ")
    with pytest.raises(SystemExit, match=r"^error: .*none not found: train first"):
        main(["save", str(tmp_path / "none"), str(tmp_path / "other")])
    with pytest.raises(SystemExit, match=r"^error: 'mine' is no name of a model on the Hub: give user/name"):
        main(["push", str(tmp_path), "mine"])


def test_without_huggingface_hub_folders_work_and_names_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = make_model()
    model.save_pretrained(tmp_path)
    assert torch.allclose(features(TMASS.from_pretrained(str(tmp_path))), features(model), atol=1e-6)
    for call in (lambda: TMASS.from_pretrained("user/name"), lambda: push_to_hub(model, "user/name")):
        with pytest.raises(ModelError, match=r"needs huggingface_hub, .*: pip install huggingface_hub, or"):
            call()


def test_a_path_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("asked"))
    make_model().save_pretrained("user/name")
    assert TMASS.from_pretrained("user/name").arguments["num_frames"] == FRAMES  # a folder of that name
    for path in (Path("runs/none"), "./none", "none", "a/b/c", str(tmp_path / "none")):
        with pytest.raises(ModelError, match=r"model\.safetensors not found\.$"):
            from_pretrained(path)
    with pytest.raises(ModelError, match=r"user/name has no revisions: leave out 'v1'"):
        from_pretrained("user/name", "v1")
    with pytest.raises(ModelError, match="not found: train first"):
        find_file(Path("user/none"))


# ---- the CLIPs of other libraries as --weights


def compare(model: torch.nn.Module, path: Path, activation: str, text, image) -> None:
    """Features of the CLIP in a file equal those of the library that it is from, to 1e-5."""
    clip = load_clip("tiny", path)
    ours = TMASS(clip)
    tokens = torch.randint(1, WORDS - 2, (TEXTS, CONTEXT), generator=torch.Generator().manual_seed(1))
    tokens[:, -1] = WORDS - 1  # the end mark, the largest number
    images = randn(VIDEOS, 3, 32, 32)
    with torch.no_grad():
        expected = text(tokens), image(images)
        found = ours.encode_text(tokens), ours.encode_frames(images[:, None])[:, 0]
    assert activation_of(clip) == activation
    for one, other in zip(found, expected):
        assert other.std() > 0.1 and torch.allclose(one, other, rtol=0, atol=1e-5)


def write(path: Path, state: dict[str, torch.Tensor], kind: str) -> Path:
    """A file of weights: plain, safetensors, of a wrapped module, or in float16."""
    if kind == "safetensors":
        safetensors.torch.save_file(state, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    prefix = "module." if kind == "wrapped" else ""
    torch.save({"state_dict": {f"{prefix}{name}": x for name, x in state.items()}}, path)
    return path


def perturbed(model: torch.nn.Module, kind: str) -> torch.nn.Module:
    """The model with no parameter at zero or one, where a wrong term would hide; fp16: rounded to it."""
    for k, parameter in enumerate(model.parameters()):
        parameter.data += 0.05 * randn(*parameter.shape, seed=k)
    return model.half().float() if kind == "float16" else model


def stored(model: torch.nn.Module, kind: str) -> dict[str, torch.Tensor]:
    return {name: x.half() if kind == "float16" else x for name, x in model.state_dict().items()}


KINDS = ["plain", "safetensors", "wrapped", "float16"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quick", [True, False], ids=["quickgelu", "gelu"])
def test_features_of_a_clip_of_transformers_equal_its_own(tmp_path, kind, quick):
    import_clip()  # first: it makes the torchvision importable that transformers imports
    transformers = pytest.importorskip("transformers")
    act = {"hidden_act": "quick_gelu" if quick else "gelu"}
    text = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, **act)
    text |= dict(max_position_embeddings=CONTEXT, vocab_size=WORDS)
    text |= dict(bos_token_id=WORDS - 2, eos_token_id=WORDS - 1)
    vision = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, **act)
    vision |= dict(image_size=32, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = perturbed(transformers.CLIPModel(config).float().eval(), kind)
    config.save_pretrained(tmp_path)
    path = write(tmp_path / "pytorch_model.bin", stored(model, kind), kind)

    def encode_text(tokens):
        return model.text_projection(model.text_model(input_ids=tokens).pooler_output)

    def encode_image(images):
        return model.visual_projection(model.vision_model(pixel_values=images).pooler_output)

    compare(model, path, act["hidden_act"], encode_text, encode_image)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quick", [True, False], ids=["quickgelu", "gelu"])
def test_features_of_a_clip_of_open_clip_equal_its_own(tmp_path, kind, quick):
    import_clip()
    open_clip = pytest.importorskip("open_clip")
    vision = dict(layers=3, width=128, head_width=64, image_size=32, patch_size=8)
    text = dict(context_length=CONTEXT, vocab_size=WORDS, width=64, heads=1, layers=2)
    sizes = dict(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=quick)
    model = perturbed(open_clip.CLIP(**sizes).float().eval(), kind)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes}))
    path = write(tmp_path / "open_clip_pytorch_model.bin", stored(model, kind), kind)
    activation = "quick_gelu" if quick else "gelu"
    compare(model, path, activation, model.encode_text, model.encode_image)
