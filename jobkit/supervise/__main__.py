"""`python -m jobkit.supervise -- CMD`: run one attempt of CMD."""

from jobkit.supervise.supervisor import main

if __name__ == "__main__":
    main()
