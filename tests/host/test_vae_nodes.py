"""Decoding and encoding over HTTP: progress, the line about memory, stock nodes beside ours, refusals."""

import pytest

from demo import comfy

VAE = {"class_type": "OpenSoraVAELoader", "inputs": {"vae_name": "hunyuan_vae.safetensors"}}


def graph(frames=5, width=64, height=48, batch=1, **changes) -> dict:
    """An empty clip decoded and saved; `changes` go into the decoder's inputs."""
    clip = {"resolution": "custom", "aspect_ratio": "16:9", "num_frames": frames, "width": width, "height": height, "batch_size": batch}
    decode = {"vae": ["vae", 0], "latent": ["latent", 0], "tile_size": 256, "overlap": 0.25, "temporal_tile": 0, "policy": "auto"}
    return {
        "vae": VAE,
        "latent": {"class_type": "OpenSoraEmptyLatentVideo", "inputs": clip},
        "decode": {"class_type": "OpenSoraTiledVAEDecode", "inputs": {**decode, **changes}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": "decoded"}},
    }


def test_decode_with_progress_per_tile(listen):
    events = listen(graph(width=80, height=80, batch=2, tile_size=64))
    assert events.error is None and len(events.outputs["save"]["images"]) == 10
    assert events.progress("decode")[-1] == (8, 8)  # two videos of two by two tiles
    assert all("of one colour" in line for _, line in events.texts)  # an empty latent's, and no other line


def test_temporal_tiles_are_said_on_the_node(listen):
    events = listen(graph(frames=69, width=32, height=32, policy="low_memory"))
    assert len(events.outputs["save"]["images"]) == 69
    [(node, line)] = {event for event in events.texts if "of one colour" not in event[1]}  # as an empty latent's are
    assert node == "decode" and "temporal tiles of 64 frames" in line


def test_there_and_back_through_ours_and_the_hosts_nodes(listen):
    nodes = graph(frames=9)
    tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    encode = {"vae": ["vae", 0], "image": ["decode", 0], "tile_size": 256, "overlap": 0.25, "posterior": "sample", "seed": 3}
    nodes |= {
        "encode": {"class_type": "OpenSoraTiledVAEEncode", "inputs": encode},
        "stock": {"class_type": "VAEDecode", "inputs": {"vae": ["vae", 0], "samples": ["encode", 0]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["stock", 0], "filename_prefix": "stock"}},
        "stock encode": {"class_type": "VAEEncode", "inputs": {"vae": ["vae", 0], "pixels": ["decode", 0]}},
        "tiled": {"class_type": "VAEDecodeTiled", "inputs": {"vae": ["vae", 0], "samples": ["stock encode", 0], **tiles}},
        "save tiled": {"class_type": "SaveImage", "inputs": {"images": ["tiled", 0], "filename_prefix": "tiled"}},
    }
    events = listen(nodes)
    assert events.error is None
    assert len(events.outputs["save"]["images"]) == len(events.outputs["save tiled"]["images"]) == 9


def test_refusals_are_one_sentence_and_the_queue_goes_on(listen):
    nodes = graph()
    nodes["picture"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 6, "color": 0}}
    encode = {"vae": ["vae", 0], "image": ["picture", 0], "tile_size": 256, "overlap": 0.25, "posterior": "mode", "seed": 0}
    nodes["encode"] = {"class_type": "OpenSoraTiledVAEEncode", "inputs": encode}
    nodes["decode"]["inputs"]["latent"] = ["encode", 0]
    assert listen(nodes).error["exception_message"].strip() == "Use 5 or 9: num_frames=6 is not 4k+1."
    nodes = graph()
    nodes["latent"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    assert "This LATENT is [1, 4, 8, 8]; a video latent is" in listen(nodes).error["exception_message"]
    assert listen(graph(frames=1)).error is None


def test_sizes_are_refused_when_queued(server):
    for changes, words in (
        ({"tile_size": 100}, "tile_size=100 is not a multiple of 16"),
        ({"temporal_tile": 10}, "temporal_tile=10 is not"),
    ):
        with pytest.raises(comfy.HostError, match=words):
            server.run(graph(**changes))
