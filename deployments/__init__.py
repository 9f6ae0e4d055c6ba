"""Ray Serve deployments: thin glue around serve_app, and the only package that imports ray."""
