"""Faults of an object store and of the network before it."""


def lie_about_range(server, **effects):
    """Respond to a range request with the Content-Range of another range."""
    wrong = {"Content-Range": "bytes 7-4194310/25166336"}
    server.faults.add("store", headers=wrong, **effects)


def other_etag(server, **effects):
    server.faults.add("store", headers={"ETag": '"another"'}, **effects)


def revoke(server, **effects):
    server.signer.revoke_all()


def redirect(url):
    return lambda server, **effects: server.faults.add("store", redirect_to=url, **effects)


def redirect_to_itself(server, **effects):
    """Redirect to another name of the host, without a signature."""
    other = server.store_url.replace("127.0.0.1", "localhost")
    server.faults.add("store", redirect_to=f"{other}/archives/x", **effects)


def rule(**effects):
    return lambda server, **more: server.faults.add("store", **effects, **more)


#: Faults by name, with the result of a read if the fault occurs once: "right", or "any" if an
#: error is possible. A fault is a function of a server that takes `times` and other conditions of
#: `FaultPlan.add`.
FAULTS = {
    "no response": (rule(refuse=True), "right"),
    "reset": (rule(reset=True), "right"),
    "truncated at the start": (rule(cut_after_bytes=0), "right"),
    "truncated in the middle": (rule(cut_after_bytes=1_000_001), "right"),
    "stall before the body": (rule(stall_after_bytes=0), "right"),
    "stall in the middle": (rule(stall_after_bytes=1_000_001), "right"),
    "hang": (rule(hang=True), "right"),
    "1 byte a second": (rule(bytes_per_s=20), "right"),
    "403": (rule(status=403), "right"),
    "403 of a URL that was valid": (revoke, "right"),
    "401": (rule(status=401), "right"),
    "400": (rule(status=400), "right"),
    "404": (rule(status=404), "right"),
    "410": (rule(status=410), "right"),
    "500": (rule(status=500), "right"),
    "503 with Retry-After": (rule(status=503, headers={"Retry-After": "0"}), "right"),
    "503 with a long Retry-After": (rule(status=503, headers={"Retry-After": "3600"}), "any"),
    "429": (rule(status=429), "right"),
    "an HTML page": (rule(html=True, status=200), "any"),
    "204": (rule(status=204), "any"),
    "304": (rule(status=304), "any"),
    "another Content-Range": (lie_about_range, "right"),
    "no Content-Range": (rule(headers={"Content-Range": None}), "right"),
    "nonsense in Content-Range": (rule(headers={"Content-Range": "bytes 0-1"}), "right"),
    "a larger length": (rule(headers={"Content-Length": "4194999"}), "right"),
    "a smaller length": (rule(headers={"Content-Length": "999"}), "right"),
    "200 for a range": (rule(ignore_range=True), "right"),
    "200 for a range, truncated": (rule(ignore_range=True, cut_after_bytes=9_000_001), "right"),
    "416": (rule(status=416), "right"),
    "416 with another length": (
        rule(status=416, headers={"Content-Range": "bytes */5"}),
        "any",
    ),
    "gzip on identity": (rule(headers={"Content-Encoding": "gzip"}), "right"),
    "no ETag": (rule(headers={"ETag": None}), "right"),
    "another ETag": (other_etag, "any"),
    "redirect to http of another host": (redirect_to_itself, "right"),
    "redirect to a file": (redirect("file:///etc/passwd"), "any"),
    "redirect to nowhere": (redirect("http://127.0.0.1:1/"), "right"),
    "redirect to an unknown name": (redirect("http://nothing.invalid/"), "right"),
    "redirect to TLS without TLS": (
        lambda server, **more: redirect(server.store_url.replace("http:", "https:"))(
            server, **more
        ),
        "right",
    ),
    "redirect loop": (
        lambda server, **more: redirect(f"{server.store_url}/archives/x")(server, **more),
        "right",
    ),
}
