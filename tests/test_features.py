import shutil
from dataclasses import replace

import pytest
import torch
from conftest import small_clip

from engine.features import FeatureCache, extract_features, feature_cache, main
from engine.frames import FrameCache
from model import TMASS


def test_features_are_those_of_each_clip_and_caption_alone(clips, tmp_path):
    model, cache = TMASS(small_clip(), num_frames=3), FrameCache(tmp_path, 3, 32)
    model.train()
    whole = extract_features(model, clips, cache, batch=7)
    part = extract_features(model, clips[5:6], cache)
    assert model.training and whole.text.shape == (120, 24) and whole.frames.shape == (24, 3, 24)
    assert whole.owner.tolist() == [k // 5 for k in range(120)]
    assert torch.allclose(part.frames[0], whole.frames[5], atol=1e-5)
    assert torch.allclose(part.text, whole.text[25:30], atol=1e-5)


def test_kept_features_replace_frames_and_videos(clips, tmp_path):
    shutil.copytree(clips[0].path.parent, tmp_path / "videos")
    own = [replace(clip, path=tmp_path / "videos" / clip.path.name) for clip in clips[:5]]
    model, cache = TMASS(small_clip(), num_frames=3), FrameCache(tmp_path / "cache", 3, 32)
    store = feature_cache(cache, model)
    expected = extract_features(model, own, cache, store=store)
    assert not store.folder.exists()  # keep="none" writes nothing
    extract_features(model, own[1:], cache, batch=2, store=store, keep="vision")
    assert len(list(store.folder.iterdir())) == 4
    extract_features(model, own, cache, store=store, keep="vision")
    for path in [*cache.folder.glob("*.zip"), *(tmp_path / "videos").iterdir()]:
        path.unlink()
    again = extract_features(model, own, cache, store=store)
    assert torch.allclose(again.frames, expected.frames, atol=1e-5) and torch.equal(again.text, expected.text)


def test_other_weights_have_another_cache(tmp_path):
    cache = FrameCache(tmp_path, 3, 32)
    one, two, three = (feature_cache(cache, TMASS(small_clip(seed=seed), num_frames=3)) for seed in (0, 0, 1))
    assert one.folder == two.folder != three.folder


def test_features_are_kept_until_the_video_changes(clips, tmp_path):
    clip = replace(clips[0], path=tmp_path / "clip.mp4")
    shutil.copy(clips[0].path, clip.path)
    cache = FrameCache(tmp_path / "cache", 3, 32)
    store, features = FeatureCache(cache, "abc"), torch.randn(3, 24)
    assert store.load(clip) is None
    cache.fill([clip])
    store.save(clip, features)
    assert torch.equal(store.load(clip), features) and FeatureCache(cache, "other weights").load(clip) is None
    clip.path.unlink()
    assert torch.equal(store.load(clip), features)  # without the video
    shutil.copy(clips[0].path, clip.path)
    assert torch.equal(store.load(clip), features)  # of a copy, which has another time
    shutil.copy(clips[1].path, clip.path)
    assert store.load(clip) is None
    store.path(clip).write_bytes(b"half a file")
    assert store.load(clip) is None


def test_a_mistake_on_the_command_line_gives_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: [^\n]*gone\.pt not found[^\n]*$"):
        main(["--dataset=csv", f"--data={tmp_path}", f"--weights={tmp_path / 'gone.pt'}"])


def test_texts_are_encoded_once_for_each_phi_t_and_each_list_of_captions(clips, tmp_path, monkeypatch):
    model, cache = TMASS(small_clip(), num_frames=3), FrameCache(tmp_path, 3, 32)
    options = dict(store=feature_cache(cache, model), keep="clip")
    first = extract_features(model, clips[:4], cache, **options)
    (file,) = (cache.folder / "texts").iterdir()
    real, calls = TMASS.encode_text, []
    monkeypatch.setattr(TMASS, "encode_text", lambda *given: calls.append(1) or real(*given))
    assert torch.equal(extract_features(model, clips[:4], cache, **options).text, first.text) and not calls
    extract_features(model, clips[:3], cache, **options)  # other captions
    file.write_bytes(file.read_bytes()[:-1])  # damaged: computed again, and mended
    assert torch.equal(extract_features(model, clips[:4], cache, **options).text, first.text)
    with torch.no_grad():
        model.clip.ln_final.weight[0] += 1  # another phi_t
    assert not torch.equal(extract_features(model, clips[:4], cache, **options).text, first.text)
    assert len(calls) == 3 and len(list((cache.folder / "texts").iterdir())) == 3
