"""`python -m fibattn` is the command `fibattn`."""

from fibattn.cli.main import main

raise SystemExit(main())
