"""Emulators of s3 and gs on this machine, once a process: libraries keep the first server that they found."""

import importlib.util
from http import HTTPStatus

import pytest

from llama_jax import paths


def with_generations(handler, objects):
    """A handler of the emulator of gs that knows what tensorstore asks for: the generation of an object."""

    def handle(request, response, storage, *args, **kwargs):
        name = request.params.get("object_id") or request.query.get("name", [""])[0]
        try:
            generation = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except objects.NotFound:
            generation = "0"
        if request.query.get("ifGenerationMatch", [generation]) != [generation]:
            _ = request.data  # or it would stay in the connection
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif request.query.get("ifGenerationNotMatch") == [generation]:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handler(request, response, storage, *args, **kwargs)
            response["x-goog-generation"] = generation

    return handle


@pytest.fixture(scope="session")
def emulators():
    """The environment in which every library finds both emulators."""
    moto = pytest.importorskip("moto.server", reason="the emulator of s3 (moto) is not installed")
    gcp = pytest.importorskip("gcp_storage_emulator.server", reason="the emulator of gs is not installed")
    for library in ("s3fs", "gcsfs"):
        if not importlib.util.find_spec(library):
            pytest.skip(f"{library} is not installed")
    s3 = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    gs = gcp.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    for _, handlers in gcp.HANDLERS:
        for method, handler in handlers.items():
            if handler in (gcp.objects.get, gcp.objects.insert):
                handlers[method] = with_generations(handler, gcp.objects)
    s3.start()
    gs.start()
    at_s3, at_gs = f"http://127.0.0.1:{s3.get_host_and_port()[1]}", f"http://127.0.0.1:{gs._api._httpd.server_port}"
    environment = {
        "AWS_ENDPOINT_URL": at_s3,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "STORAGE_EMULATOR_HOST": at_gs,
        "TENSORSTORE_GCS_HTTP_URL": at_gs,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # the emulator does not know kinds of buckets
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        paths._filesystem("s3").mkdir("bucket")
    yield environment
    gs.stop()
    s3.stop()


@pytest.fixture
def endpoints(emulators, monkeypatch):
    """Every library of this process asks the emulators."""
    for name, value in emulators.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["gs", "s3"])
def store(request, endpoints, tmp_path, monkeypatch):
    """An empty folder of a bucket, as text; commands run in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = paths.as_path(f"{request.param}://bucket/{tmp_path.name}")
    yield str(folder)
    paths.remove_directory(folder)
