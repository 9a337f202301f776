"""How alembic runs: on the connection that `database.open_database` hands over."""

from alembic import context

from fathom.server.database import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
