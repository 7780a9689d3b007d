"""MLflow's own server, small: its application on werkzeug and SQLite, on loopback. Prints its port, serves till killed.

`mlflow server` is in the full package alone, with pandas, scikit-learn and pyarrow; the application itself is in
mlflow-skinny and needs flask, sqlalchemy and alembic.
"""

import os
import sys


def main(directory: str) -> None:
    """Serve from a directory."""
    os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{directory}/mlflow.db"
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = f"{directory}/artifacts"
    from mlflow.server import app
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", int(os.environ.get("PORT", "0")), app, threaded=True)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
