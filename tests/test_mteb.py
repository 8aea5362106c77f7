"""MTEB: its models give what evaluate.py gives. Without mteb installed, on a stand-in for its data sets."""

import json
import sys
import types

import pytest
import torch
from conftest import randn, random_model, small_clip

import evaluate
import mteb_model
from engine.checkpoint import save_checkpoint, to_record
from engine.config import preset
from engine.features import extract_features
from engine.files import DataError
from engine.frames import FrameCache
from engine.scoring import noise_bank, scores
from model import MeanPool
from mteb_model import FramePooledCLIP, PairScorer, encode_videos, single_vectors

OPTIONS = dict(encode_kwargs={"batch_size": 3}, task_metadata=None, hf_split="test", hf_subset="default")


class Rows:
    """A data set of Hugging Face, as far as mteb_model.py uses it."""

    def __init__(self, **columns):
        self.columns, self.column_names = columns, [*columns]

    def __getitem__(self, name):
        return self.columns[name]

    def cast_column(self, name, feature):
        assert (name, feature) == ("video", "not decoded")
        return self


@pytest.fixture
def stand_in(monkeypatch):
    """`from datasets import Video` without the package datasets."""
    known = types.SimpleNamespace(Video=lambda decode: None if decode else "not decoded")
    monkeypatch.setitem(sys.modules, "datasets", known)


@pytest.fixture
def test_clips(clips):
    return [clip for clip in clips if clip.split == "test"]


def videos_of(clips) -> Rows:
    rows = [{"bytes": None, "path": str(clip.path)} for clip in clips]
    return Rows(id=[f"v{k}" for k in range(len(clips))], video=rows)


def texts_of(clips) -> Rows:
    captions = [caption for clip in clips for caption in clip.captions]
    return Rows(id=[f"t{k}" for k in range(len(captions))], text=captions)


@pytest.mark.parametrize("method", ["xpool", "tmass"])
def test_a_search_gives_the_scores_of_evaluate_both_ways(method, test_clips, stand_in, tmp_path):
    model = random_model(method)
    features = extract_features(model, test_clips, FrameCache(tmp_path, 4, model.resolution), batch=4)
    noise = noise_bank(3 if method == "tmass" else 0, 24, seed=0)
    expected = scores(model, features.text, features.frames, noise)
    scorer = PairScorer(model, {}, M=3)
    for index, query, table in (
        (videos_of, texts_of, expected),
        (texts_of, videos_of, expected.T),
    ):
        corpus, queries = index(test_clips), query(test_clips)
        scorer.index(corpus, **OPTIONS, num_proc=None)
        found = scorer.search(queries, top_k=100, **OPTIONS, num_proc=None)
        everything = [[found[q][d] for d in corpus["id"]] for q in queries["id"]]
        assert torch.allclose(torch.tensor(everything), table, atol=1e-5)
        best = scorer.search(queries, top_k=1, **OPTIONS)
        assert [*best[queries["id"][0]]] == [corpus["id"][table[0].argmax()]]


def test_a_reranking_scores_only_the_documents_that_are_named(test_clips, stand_in):
    scorer = PairScorer(random_model("xpool"), {})
    scorer.index(videos_of(test_clips), **OPTIONS)
    queries = texts_of(test_clips[:1])
    named = {name: ["v3", "v1"] for name in queries["id"]}
    found = scorer.search(queries, top_k=9, top_ranked=named, **OPTIONS)
    assert all({*ranked} == {"v1", "v3"} for ranked in found.values())


def test_texts_with_texts_are_compared_by_their_cosine(test_clips, stand_in):
    scorer, texts = PairScorer(random_model("tmass"), {}), texts_of(test_clips)
    scorer.index(texts, **OPTIONS)
    found = scorer.search(texts, top_k=1, **OPTIONS)
    assert [[*ranked] for ranked in found.values()] == [[name] for name in texts["id"]]


def test_the_encoder_of_frame_pooled_clip_gives_the_scores_of_evaluate(test_clips, stand_in, tmp_path):
    model = random_model("clip")
    features = extract_features(model, test_clips, FrameCache(tmp_path, 4, model.resolution), batch=4)
    encoder = FramePooledCLIP(model)
    text, video = (
        encoder.encode(types.SimpleNamespace(dataset=rows), batch_size=3)
        for rows in (texts_of(test_clips), videos_of(test_clips))
    )
    expected = scores(model, features.text, features.frames, noise_bank(0, 24, seed=0))
    assert torch.allclose(encoder.similarity(text, video), expected, atol=1e-5)
    assert torch.allclose(encoder.similarity_pairwise(text[:4], video), expected[:4].diag(), atol=1e-5)
    assert encoder.similarity(text[0], video).shape == (1, 4)
    frames = randn(3, 4, 24) * torch.tensor([1.0, 2, 5, 9])[:, None]
    assert torch.allclose(single_vectors(frames), MeanPool()(randn(1, 24), frames)[0])


def test_videos_as_bytes_and_as_paths_give_the_same_features_in_any_batches(test_clips):
    model = random_model("clip")
    paths = [{"bytes": None, "path": str(clip.path)} for clip in test_clips]
    contents = [
        {"bytes": clip.path.read_bytes(), "path": name} for clip, name in zip(test_clips, (None, "a.mp4") * 2)
    ]
    assert torch.allclose(encode_videos(model, paths, 4), encode_videos(model, contents, 3), atol=1e-5)


def test_a_video_that_cannot_be_read_is_named_by_its_place(test_clips):
    rows = [{"bytes": test_clips[0].path.read_bytes(), "path": None}, {"bytes": b"no video", "path": None}]
    with pytest.raises(DataError, match=r"^video 1 of the task cannot be read: "):
        encode_videos(random_model("clip"), rows, batch=1)


@pytest.fixture
def run(tmp_path, weights, test_clips, monkeypatch):
    """A run of T-MASS on MSR-VTT, as train.py leaves it."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(
        tmp_path / "run" / "best.pt", random_model("tmass"), config=to_record(preset("msrvtt", "tmass"))
    )
    return tmp_path / "run"


def test_without_mteb_the_command_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(
        SystemExit, match=r'^error: mteb cannot be imported \(.*\): pip install "\.\[mteb\]"\.$'
    ):
        mteb_model.main(["--checkpoint", str(run)])


def test_what_the_command_cannot_do_is_one_sentence(run):
    with pytest.raises(SystemExit, match=r"^error: --M -1"):
        mteb_model.main(["--checkpoint", str(run), "--M", "-1"])


# ---- with mteb


def task_of(clips, mteb):
    """A retrieval task of MTEB made of clips: each caption is a query, its video the relevant document."""
    from datasets import Dataset, Video
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    texts, videos = texts_of(clips), videos_of(clips)
    corpus = Dataset.from_dict({"id": videos["id"], "video": [row["path"] for row in videos["video"]]})
    split = RetrievalSplitData(
        queries=Dataset.from_dict(texts.columns),
        corpus=corpus.cast_column("video", Video()),
        relevant_docs={f"t{k}": {f"v{k // 5}": 1} for k in range(5 * len(clips))},
        top_ranked=None,
    )

    class Clips(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Clips", description="Built-in clips.", dataset={"path": "clips", "revision": "1"},
            type="Any2AnyRetrieval", category="t2v", modalities=["text", "video"], eval_langs=["eng-Latn"],
            eval_splits=["test"], main_score="recall_at_1", reference=None, date=None, domains=None,
            task_subtypes=None, license=None, annotations_creators=None, dialect=None, sample_creation=None,
            bibtex_citation=None,
        )  # fmt: skip

        def load_data(self, **_):
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Clips()


@pytest.mark.parametrize("method", ["clip", "tmass"])
def test_R_at_1_of_a_task_of_built_in_clips_is_that_of_evaluate(
    method, clips_folder, test_clips, tmp_path, monkeypatch, capsys
):
    mteb = pytest.importorskip("mteb")
    monkeypatch.chdir(tmp_path)
    config = to_record(preset("shapes", method)) | {"dataset": "csv"}
    save_checkpoint(tmp_path / "run" / "best.pt", random_model(method, seed=1), config=config)
    places = ["--annotations", str(clips_folder / "clips.csv"), "--videos", str(clips_folder / "clips")]
    evaluate.main(["--checkpoint", "run", "--dataset", "csv", *places, "--data", str(tmp_path / "data")])
    expected = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["t2v"]
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [task_of(test_clips, mteb)])
    mteb_model.main(["--checkpoint", "run", "--out", "results"])
    printed = capsys.readouterr().out
    assert f"Clips: R@1 {expected['R@1']:.1f}  R@5 {expected['R@5']:.1f}" in printed
    (written,) = (tmp_path / "results").glob("**/Clips.json")
    (row,) = json.loads(written.read_text())["scores"]["test"]
    assert 100 * row["recall_at_1"] == pytest.approx(expected["R@1"])


def test_the_metadata_say_what_a_run_was_trained_on_and_which_file_it_is(run):
    pytest.importorskip("mteb")
    meta = mteb_model.open_run(run).mteb_model_meta
    assert meta.name == "tmass/tmass-vit-b-32-msrvtt" and "MSRVTTT2V" in meta.training_datasets
    assert meta.n_parameters == sum(x.numel() for x in random_model("tmass").parameters())
    assert mteb_model.open_run(run, M=7).mteb_model_meta.experiment_kwargs == {"M": 7}
    save_checkpoint(
        run / "best.pt", random_model("tmass", seed=1), config=to_record(preset("msrvtt", "tmass"))
    )
    assert mteb_model.open_run(run).mteb_model_meta.revision != meta.revision


def test_the_metadata_of_clip_load_its_model(monkeypatch):
    pytest.importorskip("mteb")
    loaded = []
    monkeypatch.setattr(mteb_model, "load_clip", lambda arch: loaded.append(arch) or small_clip())
    metas = mteb_model.clip_metas()
    assert [meta.adapted_from for meta in metas] == [f"openai/clip-vit-base-patch{size}" for size in (32, 16)]
    model = metas[1].loader(metas[1].name, revision=metas[1].revision, device="cpu")  # as load_model does
    assert loaded == ["ViT-B/16"] and model.model.arguments["num_frames"] == 12
    assert model.mteb_model_meta.name == metas[1].name == "tmass/clip-mean-vit-b-16"


def test_the_models_have_the_protocols_of_mteb():
    models = pytest.importorskip("mteb.models")
    scorer = PairScorer(random_model("xpool"), {}, name="tmass/a", revision="1")
    encoder = FramePooledCLIP(random_model("clip"), name="tmass/b", revision="1")
    assert isinstance(scorer, models.SearchProtocol) and not isinstance(scorer, models.EncoderProtocol)
    assert isinstance(encoder, models.EncoderProtocol)
