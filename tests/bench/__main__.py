"""`make bench`: runs the measurements."""

from tests.bench.one_request import main

if __name__ == "__main__":
    main()
