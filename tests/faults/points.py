"""The named points at which tests kill an aggregator or a worker, in the order in which a round passes them."""

from fedgrpc.storage.files import UNFINISHED
from tests.faults.killed_at import Point

_AGGREGATOR = "fedgrpc.aggregator"
_STORAGE = "fedgrpc.storage"
_WORKER = "fedgrpc.worker"
_TRAINING = "tests.faults.tasks:Repeatable.half_way"


def _is_model_part(path, *_):
    return path.suffix == ".part" and path.parent.name == "models"


def _behind_the_first_chunk(_, payload, offset, *__):
    return offset > 0


def _head_of_an_upload(_, data, offset):
    """`ResumableFile._commit` writes the count of committed bytes at offset 0, after the bytes themselves."""
    return offset == 0


def _unfinished(upload, *_):
    return not upload.complete


def _with_examples(_, header, *__):
    """Not an evaluator's scores."""
    return header.example_count > 0


def _is_spooled(path, *_):
    return path.parent.name == "spool" and path.name.startswith(UNFINISHED)


# With three devices: the fifth of what every update does is the second update of round 2.
AGGREGATOR = {
    "importing-the-initial-model": Point(f"{_STORAGE}.run_store:RunStore.save_version"),
    "register-not-stored": Point(f"{_STORAGE}.run_store:RunStore.save_worker", count=2),
    "register-stored-not-answered": Point(f"{_STORAGE}.run_store:RunStore.save_worker", "after", count=2),
    "poll-waiting": Point(f"{_AGGREGATOR}.worker_calls:WorkerCalls.token_for", "after", count=7),
    "tasks-chosen-not-stored": Point(f"{_STORAGE}.run_store:RunStore.save_open_round", count=2),
    "tasks-stored-not-offered": Point(f"{_STORAGE}.run_store:RunStore.save_open_round", "after", count=2),
    "encoding-the-model": Point(f"{_AGGREGATOR}.payload_encoder:_write", "after", count=2),
    "mid-pull": Point(f"{_AGGREGATOR}.chunk_cache:ChunkCache._message", "after", _behind_the_first_chunk, count=2),
    "push-between-bytes-and-their-count": Point(
        f"{_STORAGE}.resumable:pwrite", "before", _head_of_an_upload, count=8
    ),
    "mid-push": Point(f"{_STORAGE}.resumable:ResumableFile._commit", "after", _unfinished, count=9),
    "last-chunk-stored": Point(f"{_STORAGE}.uploads:Upload.finish", count=5),
    "verified-not-durable": Point(f"{_STORAGE}.uploads:Upload.seal", count=5),
    "durable-not-renamed": Point("os:fdatasync", "after", count=5),
    "renamed-not-counted": Point(f"{_AGGREGATOR}.acceptance:Acceptance._count", count=5),
    "counted-not-acknowledged": Point(
        f"{_AGGREGATOR}.receiver:Receiver.receive", "after", _with_examples, count=5
    ),
    "before-the-commit": Point(f"{_AGGREGATOR}.commit:ModelCommit.write", count=2),
    "half-a-model-written": Point(f"{_STORAGE}.model_file:ModelWriter.add", "after", count=12),
    "optimizer-state-written": Point(f"{_STORAGE}.model_file:ModelWriter.finish", "after", count=4),
    "model-not-renamed": Point("pathlib:Path.replace", "before", _is_model_part, count=3),
    "model-renamed": Point("pathlib:Path.replace", "after", _is_model_part, count=3),
    "before-the-transaction": Point(f"{_STORAGE}.run_store:RunStore.finish_round", count=2),
    "within-the-transaction": Point(f"{_STORAGE}.run_store:RunStore._insert_version", "after", count=3),
    "after-the-transaction": Point(f"{_STORAGE}.run_store:RunStore.finish_round", "after", count=2),
    "half-the-updates-removed": Point("fedgrpc.storage.files:RecycledFiles.keep", "after", count=5),
    "before-old-versions-go": Point(f"{_AGGREGATOR}.encoded_models:EncodedModels._remove_files", count=2),
    "keeping-an-evaluators-scores": Point(f"{_STORAGE}.run_store:RunStore.add_scores", count=2),
    "draining": Point(
        "grpc_health.v1._async:HealthServicer.enter_graceful_shutdown",
        "after",
        sigterm_at=f"{_STORAGE}.resumable:ResumableFile._commit",
    ),
    "recovering": Point(f"{_STORAGE}.uploads:UploadJournal.keep_only"),
}

# Of a run whose versions get noise.
PRIVATE = {
    "release-not-entered": Point(f"{_STORAGE}.run_store:RunStore.save_release", count=2),
    "release-entered": Point(f"{_STORAGE}.run_store:RunStore.save_release", "after", count=2),
    "half-a-noisy-model-written": Point(f"{_STORAGE}.model_file:ModelWriter.add", "after", count=12),
    "noisy-model-renamed": Point("pathlib:Path.replace", "after", _is_model_part, count=3),
    "before-the-noisy-transaction": Point(f"{_STORAGE}.run_store:RunStore.finish_round", count=2),
    "noise-key-not-written": Point(f"{_AGGREGATOR}.private_releases:noise_key"),
}

# Round 1 has ended and carries one task on; round 2 has not begun, or nobody knows yet that it has.
CARRYING = {
    "carrying-not-committed": Point(f"{_STORAGE}.run_store:RunStore.finish_round"),
    "carrying-within-the-transaction": Point(f"{_STORAGE}.run_store:RunStore._insert_version", "after", count=2),
    "carrying-committed": Point(f"{_STORAGE}.run_store:RunStore.finish_round", "after"),
    "carrying-updates-removed": Point(f"{_STORAGE}.uploads:UploadJournal.discard", "after"),
    "carrying-next-round-not-stored": Point(f"{_STORAGE}.run_store:RunStore.save_open_round", count=2),
    "carrying-next-round-not-offered": Point(f"{_STORAGE}.run_store:RunStore.save_open_round", "after", count=2),
}

# Of a run with secure sums, in which one device has keys that nobody takes.
SECURE = {
    "secure-tasks-not-stored": Point(f"{_STORAGE}.run_store:RunStore.save_open_round"),
    "secure-tasks-stored": Point(f"{_STORAGE}.run_store:RunStore.save_open_round", "after"),
}

# Of a leaf with secure sums, in its first round.
SECURE_LEAF = {
    "leaf-tasks-not-stored": Point(f"{_STORAGE}.run_store:RunStore.save_open_round"),
    "leaf-tasks-stored": Point(f"{_STORAGE}.run_store:RunStore.save_open_round", "after"),
    "leaf-roster-not-stored": Point(f"{_AGGREGATOR}.stored_sum:store", count=2),
    "leaf-question-stored": Point(f"{_AGGREGATOR}.stored_sum:store", "after", count=3),
    "leaf-sum-made": Point("fedgrpc.hierarchy.parent_rounds:ParentRounds._write_bounds"),
    "leaf-bounds-stored": Point("fedgrpc.hierarchy.parent_rounds:ParentRounds._write_bounds", "after"),
    "leaf-mean-stored": Point("fedgrpc.hierarchy.partial_aggregate:AggregateFile.write", "after"),
    "leaf-round-stored": Point(f"{_STORAGE}.run_store:RunStore.finish_round", "after"),
}

WORKER = {
    "registered": Point(f"{_WORKER}.client:AggregatorClient.register", "after"),
    "idle": Point(f"{_WORKER}.client:AggregatorClient.poll", count=2),
    "given-a-task": Point(f"{_WORKER}.training:TrainerWork.perform", since_round=2),
    "mid-download": Point(f"{_STORAGE}.resumable:ResumableFile.append", "after", _unfinished, since_round=2),
    "downloaded-not-verified": Point(f"{_WORKER}.model_folder:ModelFolder.finish", since_round=2),
    "downloaded": Point(f"{_WORKER}.model_folder:ModelFolder.finish", "after", since_round=2),
    "evaluating": Point("tests.faults.tasks:Repeatable.scoring", since_round=2),
    "heartbeat": Point(f"{_WORKER}.client:AggregatorClient.heartbeat", since_round=2),
    "training": Point(_TRAINING, since_round=2),
    "trained-not-spooled": Point(f"{_WORKER}.spool:Spool.write", since_round=2),
    "half-spooled": Point(f"{_STORAGE}.residual_file:ResidualWriter.finish", since_round=2),
    "spooled-not-synced": Point(f"{_WORKER}.spool:publish_folder", since_round=2),
    "synced-not-spooled": Point("pathlib:Path.rename", "before", _is_spooled, since_round=2),
    "spooled": Point(f"{_WORKER}.spool:Spool.write", "after", since_round=2),
    "mid-upload": Point("fedgrpc.rpc.client_stream:ClientStream.write", "after", count=3, since_round=2),
    "last-chunk-sent": Point("fedgrpc.rpc.client_stream:ClientStream.finish", since_round=2),
    "acknowledged-not-noted": Point(f"{_WORKER}.spool:Spool.acknowledge", since_round=2),
    "residual-kept-update-not-removed": Point(f"{_WORKER}.spool:Spool._remove", since_round=2),
    "half-removed": Point(f"{_WORKER}.spool:remove_folder", since_round=2),
    "removed": Point(f"{_WORKER}.spool:Spool.acknowledge", "after", since_round=2),
    "draining-mid-upload": Point(
        "fedgrpc.rpc.client_stream:ClientStream.write", "after", count=3, since_round=2, sigterm_at=_TRAINING
    ),
    # Armed in the test that breaks the link under it.
    "reconnecting": Point("fedgrpc.rpc.retry:Retries.next_delay_s", "after", since_round=2),
}

# Trained, but not yet whole in the spool: the same round is trained again.
TRAINED_AGAIN = {"trained-not-spooled", "half-spooled", "spooled-not-synced", "synced-not-spooled"}
