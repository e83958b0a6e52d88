from hub_fixtures import env, hub, sharded  # noqa: F401
