"""Two replicas on Ray Serve answer as the plain server does."""

import inspect
import os
from collections import Counter
from pathlib import Path

import httpx2
import pytest
from starlette.testclient import TestClient

from tiny import tiny_model, tiny_processor

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    # Ray Serve declares its own settings in pydantic's former way.
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on .Field. is deprecated"),
]
PORT = 8126
TESTS = Path(__file__).parents[1]
REQUEST = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
    "modalities": ["text", "image"], "layout": "T I", "max_tokens": 3, "num_inference_steps": 2, "seed": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    model = tiny_model()
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def replicas(saved):
    """The address of the server."""
    import ray
    from ray import serve

    from mm_interleaved.serving.ray import ReplicaSettings, app

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("MM_INTERLEAVED_API_KEY", raising=False)
        ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        settings = ReplicaSettings(model=str(saved), device="cpu", num_replicas=2, num_cpus=0.5)
        serve.run(app(settings), route_prefix="/")
        yield f"http://127.0.0.1:{PORT}"
        serve.shutdown()
        ray.shutdown()


def test_replicas_answer_as_the_plain_server(replicas, saved):
    from mm_interleaved.generation.loading import load_generator
    from mm_interleaved.serving.app import create_app
    from mm_interleaved.serving.engine import ServingEngine
    from mm_interleaved.serving.settings import ServerSettings

    engine = ServingEngine(load_generator(saved, device="cpu"), max_running=8, max_queue=64)
    with TestClient(create_app(engine, ServerSettings(model="tiny"))) as plain:
        expected = plain.post("/v1/chat/completions", json=REQUEST).json()["choices"]
    with httpx2.Client(base_url=replicas, timeout=120) as client:
        assert {each["id"] for each in client.get("/v1/models").json()["data"]} >= {"tiny", "tiny:parts"}
        answers = [client.post("/v1/chat/completions", json=REQUEST) for _ in range(6)]
        assert Counter(answer.status_code for answer in answers) == {200: 6}
        assert all(answer.json()["choices"] == expected for answer in answers)
        with client.stream("POST", "/v1/chat/completions", json={**REQUEST, "stream": True}) as stream:
            assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"
        wrong = client.post("/v1/chat/completions", json={**REQUEST, "sed": 5})
        assert wrong.status_code == 400 and "seed" in wrong.json()["error"]["message"]


def test_serve_run_finds_the_type_of_the_settings_and_refuses_what_is_none():
    from mm_interleaved.serving.ray import ReplicaSettings, app

    # Ray reads it so, to make the settings out of `name=value`.
    assert inspect.signature(app).parameters["settings"].annotation is ReplicaSettings
    assert ReplicaSettings.model_validate({"model": "m", "num_replicas": "2"}).num_replicas == 2
    with pytest.raises(ValueError, match="replicas"):
        ReplicaSettings.model_validate({"replicas": 2})
