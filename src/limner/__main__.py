"""`python -m limner`."""

from limner.cli import main

raise SystemExit(main())
