"""Requests that reading an address takes, and what they return while another process writes."""

import json

import pytest

from dit_video.core.storage import read_document, to_storage_path, write_document

pytestmark = pytest.mark.slow  # in CI, that stage has gcsfs


def test_access_to_an_address_is_asked_for_once(gcs):
    to_storage_path("gs://bucket/a")
    count = len(gcs.requests)
    assert count > 0
    to_storage_path("gs://bucket/a")
    assert len(gcs.requests) == count
    to_storage_path("gs://bucket/b")
    assert len(gcs.requests) > count


def test_a_document_is_read_by_one_request(gcs):
    path = to_storage_path("gs://bucket/manifest.json")
    write_document(path, {"a": 1})
    count = len(gcs.requests)
    assert read_document(path) == {"a": 1}
    assert len(gcs.requests) == count + 1


@pytest.mark.parametrize("request_number", [1, 2, 3])
def test_a_document_that_is_replaced_while_it_is_read_is_the_one_or_the_other(gcs, request_number):
    short, long = [1], list(range(100))
    path = to_storage_path("gs://bucket/manifest.json")
    write_document(path, short)
    stored, requests = gcs.objects["manifest.json"], []

    def replace(method, _path):
        requests.append(method)
        if len(requests) == request_number:
            stored.content = json.dumps(long).encode()
        return 0

    gcs.fail = replace
    assert read_document(path) in (short, long)
    assert read_document(path) in (short, long)
