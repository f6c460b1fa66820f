from tests.cluster import cluster, undisturbed
async def test_a():
    async with cluster(n=4, rounds=5, daemons=[[0,1],[2,3]], evaluate=5) as c:
        s = await c.summary()
        print(s["digest"], s["final_accuracy"], s["seconds"], c.counted())
async def test_b():
    print(await undisturbed(n=4, rounds=5))
async def test_c():
    async with cluster(n=4, rounds=50, daemons=[[0,1],[2,3]]) as c:
        await c.until_round(5)
        await c.kill(c.daemons[0])
        await c.until_joined(2)
        await c.restart(c.daemons[0])
        s = await c.summary()
        print(s["digest"], s["seconds"], c.counted())
    print(await undisturbed(n=4, rounds=50))
async def test_d():
    async with cluster(n=4, rounds=5, daemons=[[0,1]]) as c:
        raw = await c.raw_session([2,3])
        p = await raw.pull()
        print(await raw.send(raw.update(2,p)))
        print(await raw.send(raw.update(2,p)))
        await raw.play()
        s = await c.summary()
        print(s["digest"], s["seconds"], c.counted())
    print(await undisturbed(n=4, rounds=5))
