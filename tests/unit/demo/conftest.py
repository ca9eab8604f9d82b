from tests.support.server import api, demo_server, server, web  # noqa: F401
