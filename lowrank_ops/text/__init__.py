"""Text for users: warnings, tables, and short lines about many layers. Imports no other folder."""
