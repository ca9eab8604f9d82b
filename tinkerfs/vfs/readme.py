"""The text of the mount's own README.md."""

TEXT = b"""\
# Your Tinker training runs and checkpoints, as files

    runs/<run_id>/info.json                          the training run
    runs/<run_id>/latest, latest_sampler             its newest checkpoints
    runs/<run_id>/checkpoints/<kind>/<name>/         one checkpoint:
        info.json      weights info (base model, LoRA rank ...) and the listing's record
        archive_url    a fresh signed URL of the archive; made when you read it
        published      1 or 0; write 1 to publish, 0 to unpublish
        expires_at     a time or "never"; write 12h, 30d, seconds, an RFC 3339 time, or never
        tinker_path    tinker://<run_id>/<kind>/<name>
        files/         the weight files; only what you read is fetched
        archive.tar    the archive as it is stored; tensors.json: what its header tells
    checkpoints/, published/, expiring/              the same checkpoints, as links
    models/, sessions/, samplers/                    runs by base model; who made them
    adapters/<run_id>@<kind>@<name>                  the files of each sampler checkpoint

Try:

    ls -lt runs                                      newest runs first
    jq .lora_rank runs/*/checkpoints/weights/*/info.json
    echo 1 > runs/<run_id>/latest/published
    ls -lh runs/<run_id>/latest_sampler/files/
    curl -o archive.tar "$(cat runs/<run_id>/latest_sampler/archive_url)"
    tinkerfs prefetch runs/<run_id>/latest_sampler   all of it to the cache, before it is read
    tinkerfs get runs/<run_id>/latest_sampler DIR    its files copied out
    rm -r runs/<run_id>/checkpoints/weights/0001     deletes that checkpoint, for good
    tinkerfs undelete .tinkerfs/trash/<name>         restores it, if mounted with --trash

Looking is free: ls, find, grep -r and du never ask the server for an archive. Nothing but a
checkpoint can be removed, and a command that tries (rm -rf of a run, find -delete) is stopped there
and may remove nothing until it has left off for a minute. mv off the mount copies no weights, so it
removes nothing either: tinkerfs get, then rm -r. Neither do cp -a, rsync and backup programs copy
weights: files and archive.tar are links.

When a command fails, the reason, in the server's own words, is in

    .tinkerfs/errors        the last 100 failures
    .tinkerfs/changes       the last 100 changes, who asked for them, and how they ended
    .tinkerfs/stats.json    calls made, cache hits, what is being waited for
    .tinkerfs/trash/        what was removed, if mounted with --trash, and is not gone yet
    .tinkerfs/refresh       write anything to forget everything that is cached
"""
