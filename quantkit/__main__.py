"""`quantkit`, and `python -m quantkit`."""

from quantkit.cli import judging, making, running, stages, using
from quantkit.cli.group import main

for command in (
    making.make,
    stages.calibrate,
    stages.sensitivity,
    making.plan,
    making.hardware,
    stages.quantize,
    making.status,
    making.recipes,
    using.inspect,
    using.families,
    judging.verify,
    judging.certify,
    judging.evaluate,
    judging.compare,
    using.export_kt,
    using.report,
    running.run,
    running.serve,
    using.publish,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
