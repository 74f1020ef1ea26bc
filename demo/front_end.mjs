// Drives the real ComfyUI front-end in a headless Chromium: makes workflow files and checks that they open cleanly.
// usage: node front_end.mjs URL < request.json > reply.json; environment: CHROMIUM, NODE_PATH (playwright-core).
// request: {build: [{name, api, columns, groups, notes, widgets, models, stamp, picture, muted, whole}]}, {check: [{name, workflow, picture}]},
// {look: [{name, workflow, vue, blocked, after, then, picture}], bare: on a host without the pack}. whole: the part that becomes one node, {inside, title, description, aliases, promoted, inputs,
// outputs, app}; the reply to build is {name: {workflow, blueprint}}.
import { createRequire } from 'node:module'
import { readFileSync } from 'node:fs'

const { chromium } = createRequire(import.meta.url)('playwright-core')
const url = process.argv[2]
const request = JSON.parse(readFileSync(0, 'utf8'))

// Runs in the page. Node ids of the description become graph ids in its order.
async function build({ name, api, columns, groups, notes, widgets, models, stamp, muted, whole }) {
  await app.loadApiJson(structuredClone(api), name)
  const graph = app.rootGraph
  const gap = { x: whole ? 60 : 32, y: 40 }
  const placed = {}
  for (const [id, note] of Object.entries(notes)) {
    const node = LiteGraph.createNode('MarkdownNote')
    node.title = note.title
    graph.add(node)
    node.widgets[0].value = note.text
    node.size = note.size
    node.color = node.bgcolor = undefined
    placed[id] = node
  }
  for (const id of Object.keys(api)) {
    const node = graph.getNodeById(id)
    if (!node) throw new Error(`${name}: no node ${id} (${api[id].class_type}) among ${graph.nodes.map((n) => n.id + n.type)}`)
    node.title = api[id]._meta?.title ?? node.title
    node.properties = { 'Node name for S&R': node.type, cnr_id: stamp.ours.includes(node.type) ? stamp.cnr_id : 'comfy-core' }
    node.properties.ver = stamp.ours.includes(node.type) ? stamp.version : stamp.host_version
    if (models[id]) node.properties.models = models[id]
    if (muted?.includes(id)) node.mode = LiteGraph.NEVER
    for (const [widget, value] of Object.entries(widgets[id] ?? {})) node.widgets.find((w) => w.name === widget).value = value
    placed[id] = node
  }
  // Columns from left to right, with room below each node for what it shows during and after a run, in either way to draw.
  const least = whole ? 300 : 210
  const rights = []
  let x = 0
  for (const column of columns) {
    let y = 0
    const width = Math.max(...column.map((id) => Math.max(placed[id].computeSize()[0], whole ? 0 : Math.ceil(37 + 8.8 * placed[id].title.length), models[id] || ['SaveVideo', 'OpenSoraRectifiedFlowSampler'].includes(placed[id].type) ? 300 : least)))
    for (const id of column) {
      const node = placed[id]
      const text = node.widgets?.filter((w) => w.options?.multiline || w.type === 'customtext').length ?? 0
      const preview = ['LoadImage', 'SaveVideo', 'OpenSoraRectifiedFlowSampler'].includes(node.type) ? 230 : 0
      const told = node.widgets?.some((w) => w.name === 'length') || node.type === 'OpenSoraT5TextEncode' ? 34 : 0 // web/js/open_sora.js
      node.size = [width, node.computeSize()[1] + text * 60 + preview + told]
      node.pos = [x, y]
      y += node.size[1] + LiteGraph.NODE_TITLE_HEIGHT + (stamp.ours.includes(node.type) ? 115 : 50)
    }
    rights.push(x + width)
    x += width + gap.x
  }
  if (!whole && notes.about) {
    // Below what is low: what comes after the sampler.
    const low = columns.slice(3).flat().map((id) => placed[id])
    const left = Math.min(...low.map((node) => node.pos[0]))
    placed.about.pos = [left, Math.max(...low.map((node) => node.pos[1] + node.size[1])) + 100]
    placed.about.size[0] = rights.at(-1) - left
  }
  const boxes = []
  for (const [title, ids] of Object.entries(groups ?? {})) {
    const group = new LiteGraph.LGraphGroup(title)
    graph.add(group)
    boxes.push(group)
    // Its own resizeTo asks for where nodes were drawn, and nothing is drawn yet.
    const nodes = ids.map((id) => placed[id])
    const margin = gap.x / 3
    const left = Math.min(...nodes.map((node) => node.pos[0])) - margin
    const top = Math.min(...nodes.map((node) => node.pos[1])) - LiteGraph.NODE_TITLE_HEIGHT - margin - group.titleHeight
    group.pos = [left, top]
    group.size = [
      Math.max(...nodes.map((node) => node.pos[0] + node.size[0])) + margin - left,
      Math.max(...nodes.map((node) => node.pos[1] + node.size[1])) + margin - top
    ]
  }
  let blueprint
  const extra = { ds: { scale: 0.75, offset: [150, 120] } }
  if (whole) {
    const inside = whole.inside.map((id) => placed[id])
    const { subgraph, node } = graph.convertToSubgraph(new Set([...inside, ...boxes]))
    subgraph.name = node.title = whole.title
    subgraph.extra = { BlueprintDescription: whole.description, BlueprintSearchAliases: whole.aliases }
    node.properties = { ...node.properties, cnr_id: stamp.cnr_id, ver: stamp.version }
    for (const [was, now] of Object.entries(whole.inputs ?? {})) subgraph.renameInput(subgraph.inputs.find((input) => input.name === was), now)
    whole.outputs.forEach((label, at) => subgraph.renameOutput(subgraph.outputs[at], label))
    const already = subgraph.inputs.filter((input) => input._widget || node.inputs.find((slot) => slot.name === input.name)?.widget)
    for (const input of already) subgraph.removeInput(input)
    for (const [id, widget, label] of whole.promoted) {
      const part = subgraph.getNodeById(id)
      const slot = part.inputs.find((input) => input.widget?.name === widget)
      const input = subgraph.inputs.find((one) => one.name === (label ?? widget)) ?? subgraph.addInput(label ?? widget, String(slot.type))
      input.connect(slot, part)
    }
    placed.whole = node
    const text = whole.promoted.filter(([id, widget]) => placed[id].widgets.find((w) => w.name === widget).element).length
    node.size = [480, Math.max(node.computeSize()[1], 200) + text * 70]
    const serialized = app.canvas._serializeItems([node])
    const form = { revision: 0, version: 0.4, config: {}, extra: {}, groups: [], links: [], last_link_id: 0, last_node_id: node.id }
    const alone = structuredClone(serialized.nodes[0])
    for (const slot of alone.inputs) slot.link = null
    for (const slot of alone.outputs) slot.links = []
    alone.pos = [0, 0]
    blueprint = { ...form, nodes: [alone], definitions: { subgraphs: structuredClone(serialized.subgraphs) } }
    if (whole.app) {
      extra.linearMode = true
      extra.linearData = { inputs: subgraph.inputs.map(({ name }) => [String(node.id), name]), outputs: whole.shown.map(String) }
    }
    let x = 0
    for (const column of whole.canvas ?? []) {
      let y = 0
      const width = Math.max(...column.map((id) => placed[id].size[0]))
      for (const id of column) {
        if (placed[id].type === 'SaveVideo') placed[id].size = [420, 420]
        placed[id].pos = [x, y]
        y += placed[id].size[1] + gap.y + LiteGraph.NODE_TITLE_HEIGHT
      }
      x += Math.max(width, ...column.map((id) => placed[id].size[0])) + gap.x
    }
  }
  const workflow = graph.serialize()
  workflow.extra = extra
  return { workflow, blueprint }
}

async function check({ workflow }) {
  await app.loadGraphData(structuredClone(workflow), true, false)
  const nodes = app.rootGraph.nodes
  const known = (node) => node.isSubgraphNode?.() || node.type in LiteGraph.registered_node_types
  return {
    api: (await app.graphToPrompt()).output,
    missing: nodes.filter((node) => !known(node)).map((node) => node.type),
    broken: nodes.filter((node) => node.has_errors).map((node) => node.type),
    links: app.rootGraph.links.size ?? Object.keys(app.rootGraph.links).length,
    widgets: Object.fromEntries(nodes.map((node) => [node.id, (node.widgets ?? []).map((widget) => [widget.name, widget.value])]))
  }
}

// Opens a file as the template browser does and says what a person would see, before a run and, with `after` (a video in the output folder), after one.
async function look({ workflow, vue, after }) {
  const setting = app.extensionManager.setting
  if (setting.get('Comfy.VueNodes.Enabled') !== Boolean(vue)) await setting.set('Comfy.VueNodes.Enabled', Boolean(vue))
  await app.loadGraphData(structuredClone(workflow), true, true, 'look', { openSource: 'template' })
  const title = LiteGraph.NODE_TITLE_HEIGHT
  const nodes = () => app.canvas.graph.nodes
  // Where a node is drawn, title included: in the newer mode that is an element of the page.
  function box(node) {
    const page = vue && document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect()
    if (!page?.width) return [node.pos[0], node.pos[1] - title, node.pos[0] + node.size[0], node.pos[1] + node.size[1]]
    const [canvas, { scale, offset }] = [app.canvas.canvas.getBoundingClientRect(), app.canvas.ds]
    const at = (x, y) => [(x - canvas.left) / scale - offset[0], (y - canvas.top) / scale - offset[1]]
    return [...at(page.left, page.top), ...at(page.right, page.bottom)]
  }
  async function settled() {
    let [was, now] = ['', '-']
    for (let tries = 0; tries < 20 && was !== now; tries++) {
      await new Promise((done) => setTimeout(done, 250))
      ;[was, now] = [now, JSON.stringify([app.canvas.ds.scale, nodes().map(box)])]
    }
    return nodes().map((node) => [node.title, ...box(node).map(Math.round)])
  }
  async function run(prefix) {
    for (const node of nodes()) {
      const id = `${prefix}${node.id}`
      const say = (kind, detail) => app.api.dispatchCustomEvent(kind, detail)
      if (node.isSubgraphNode?.() || String(node.type).startsWith('OpenSora')) say('progress_text', { nodeId: id, text: 'Done in 12 s, 55 passes saved' })
      if (node.type === 'SaveVideo') say('executed', { node: id, display_node: id, output: { images: [after], animated: [true] } })
    }
    await new Promise((done) => setTimeout(done, 400))
    return settled()
  }
  const seen = { before: await settled(), scale: app.canvas.ds.scale, is_low_quality: Boolean(app.canvas.low_quality) }
  seen.broken = nodes().filter((node) => node.has_errors).map((node) => node.type)
  if (after) {
    seen.after = await run('')
    const whole = nodes().find((node) => node.isSubgraphNode?.())
    if (whole) {
      app.canvas.openSubgraph(whole.subgraph, whole)
      seen.inside = await settled()
      seen.inside_after = await run(`${whole.id}:`)
      app.canvas.setGraph(app.rootGraph)
    }
  }
  return seen
}

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ['--no-sandbox'] })

async function open({ blocked } = {}) {
  const page = await browser.newPage({ viewport: { width: 1600, height: 900 }, locale: request.locale ?? 'en-US' })
  const [errors, noticed] = [(page.errors = []), (page.noticed = [])]
  if (blocked) await page.route(blocked, (route) => route.fulfill({ body: '', contentType: 'text/javascript' }))
  page.on('pageerror', (error) => errors.push(String(error)))
  page.on('response', (response) => response.status() < 400 || noticed.push(`${response.status()} ${new URL(response.url()).pathname}`))
  // A resource that is not there (a user's style sheet) is not an error of a workflow.
  page.on('console', (message) => {
    if (!['error', 'warning'].includes(message.type())) return
    noticed.push(`${message.type()} ${message.text()}`)
    if (message.type() === 'error' && !/Failed to load resource|before initialization/.test(message.text())) errors.push(message.text())
  })
  await page.goto(url)
  await ready(page)
  await page.evaluate(async (body) => {
    for (const [id, value] of Object.entries(body)) await app.extensionManager.setting.set(id, value)
  }, request.settings ?? {})
  await page.keyboard.press('Escape') // a new user's first page begins with the template browser
  return page
}

async function ready(page) {
  const node = request.bare ? 'KSampler' : 'OpenSoraModelLoader'
  const is = (kind) => window.app?.extensionManager?.workflow?.activeWorkflow && app.canvas?.graph && kind in (window.LiteGraph?.registered_node_types ?? {})
  await page.waitForFunction(is, node, { timeout: 120000 })
  await page.waitForTimeout(1500) // the graph that it opens with comes last, over whatever is there
}

// Each job in turn, on one page where nothing that a job did can be seen by the next.
async function work(kind, step, jobs) {
  const reply = {}
  let page
  for (const [index, job] of jobs.entries()) {
    // The front-end remembers widgets by their node's id: a graph made after another would take its values where it names none.
    if (!page || request.build || job.blocked || (request.look && jobs[index - 1].then)) {
      await page?.close()
      page = await open(job)
    }
    page.errors.length = 0
    reply[job.name] = await page.evaluate(`(${step})(${JSON.stringify(job)})`)
    // What a test does and asks after that, in the page: [expression, seconds to wait before, picture to take after].
    for (const [expression, seconds, picture] of job.then ?? []) {
      await page.waitForTimeout(seconds * 1000)
      const said = expression === 'reload' ? await page.reload().then(() => ready(page)) : await page.evaluate(expression)
      reply[job.name].then = [...(reply[job.name].then ?? []), said]
      if (picture) await page.screenshot({ path: picture })
    }
    if (job.picture) await page.screenshot({ path: job.picture })
    if (!request.build) Object.assign(reply[job.name], { errors: [...page.errors], noticed: [...page.noticed] })
  }
  await page?.close()
  return reply
}

try {
  const steps = { build: String(build), check: String(check), look: String(look) }
  const [kind] = Object.keys(steps).filter((name) => name in request)
  // Each way to draw on a page of its own at the same time: much of the time is waiting until nothing moves.
  const ways = [false, true].map((vue) => request[kind].filter((job) => Boolean(job.vue) === vue))
  const replies = await Promise.all(ways.map((jobs) => work(kind, steps[kind], jobs)))
  process.stdout.write(JSON.stringify(Object.assign({}, ...replies)))
} finally {
  await browser.close()
}
