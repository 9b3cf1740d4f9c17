"""`lightning-quant` as a script: modules beside it are importable, so that configs name classes as `digits_net.DigitsNet`.

python examples/lightning/cli.py --config examples/lightning/cli.yaml fit
python examples/lightning/cli.py --config examples/lightning/cli.yaml quantize
"""

from lightning_quant.cli import main

if __name__ == "__main__":
    main()
