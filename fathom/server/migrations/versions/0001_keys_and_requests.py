"""Keys and requests."""

import sqlalchemy as sa
from alembic import op

from fathom.server.database import Amount, Moment

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """The first tables."""
    op.create_table(
        "keys",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("hash", sa.String, nullable=False, unique=True),
        sa.Column("tail", sa.String, nullable=False),
        sa.Column("created", Moment, nullable=False),
        sa.Column("revoked", Moment),
        sa.Column("concurrency", sa.Integer),
        sa.Column("tokens_per_minute", sa.Integer),
        sa.Column("budget", Amount),
    )
    op.create_table(
        "requests",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("at", Moment, nullable=False, index=True),
        sa.Column("key", sa.String, index=True),
        sa.Column("protocol", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("hit", sa.Integer, nullable=False),
        sa.Column("miss", sa.Integer, nullable=False),
        sa.Column("output", sa.Integer, nullable=False),
        sa.Column("reasoning", sa.Integer, nullable=False),
        sa.Column("first_ms", sa.Integer),
        sa.Column("total_ms", sa.Integer, nullable=False),
        sa.Column("finish", sa.String, nullable=False),
        sa.Column("price", sa.String, nullable=False),
        sa.Column("amount", Amount, nullable=False),
    )


def downgrade() -> None:
    """Back to nothing."""
    op.drop_table("requests")
    op.drop_table("keys")
