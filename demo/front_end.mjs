// Drives the real ComfyUI front-end in a headless Chromium: makes workflow files and checks that they open cleanly.
// usage: node front_end.mjs URL < request.json > reply.json; environment: CHROMIUM, NODE_PATH (playwright-core).
// request: {build: [{name, api, columns, groups, notes, widgets, models, stamp, picture, muted}]}, {check: [{name, workflow, picture}]} or
// {blueprint: [what build takes and inside, title, description, promoted, inputs, outputs]}.
import { createRequire } from 'node:module'
import { readFileSync } from 'node:fs'

const { chromium } = createRequire(import.meta.url)('playwright-core')
const url = process.argv[2]
const request = JSON.parse(readFileSync(0, 'utf8'))

// Runs in the page. Node ids of the description become graph ids in its order.
async function build({ name, api, columns, groups, notes, widgets, models, stamp, muted }) {
  await app.loadApiJson(structuredClone(api), name)
  const graph = app.rootGraph
  const gap = { x: 60, y: 40 }
  const placed = {}
  for (const [id, note] of Object.entries(notes)) {
    const node = LiteGraph.createNode('MarkdownNote')
    node.title = note.title
    graph.add(node)
    node.widgets[0].value = note.text
    node.size = note.size
    node.color = '#432'
    node.bgcolor = '#653'
    placed[id] = node
  }
  for (const id of Object.keys(api)) {
    const node = graph.getNodeById(id)
    node.title = api[id]._meta?.title ?? node.title
    node.properties = { 'Node name for S&R': node.type, cnr_id: stamp.ours.includes(node.type) ? stamp.cnr_id : 'comfy-core' }
    node.properties.ver = stamp.ours.includes(node.type) ? stamp.version : stamp.host_version
    if (models[id]) node.properties.models = models[id]
    if (muted?.includes(id)) node.mode = LiteGraph.NEVER
    for (const [widget, value] of Object.entries(widgets[id] ?? {})) node.widgets.find((w) => w.name === widget).value = value
    placed[id] = node
  }
  let x = 0
  for (const column of columns) {
    let y = 0
    const width = Math.max(...column.map((id) => notes[id]?.size[0] ?? Math.max(placed[id].computeSize()[0], 300)))
    for (const id of column) {
      const node = placed[id]
      node.pos = [x, y]
      if (!notes[id]) {
        const text = node.widgets?.filter((w) => w.options?.multiline || w.type === 'customtext').length ?? 0
        const preview = ['LoadImage', 'SaveVideo'].includes(node.type) ? 200 : 0
        node.size = [width, node.computeSize()[1] + text * 60 + preview]
      }
      y += node.size[1] + gap.y + LiteGraph.NODE_TITLE_HEIGHT
    }
    x += width + gap.x
  }
  for (const [title, ids] of Object.entries(groups ?? {})) {
    const group = new LiteGraph.LGraphGroup(title)
    graph.add(group)
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
  const workflow = graph.serialize()
  workflow.extra = { ds: { scale: 0.6, offset: [150, 170] } }
  return workflow
}

// A part of a graph as a blueprint: one subgraph node, with the widgets that are to be seen on it.
async function blueprint(job) {
  await build({ ...job, notes: {} })
  const graph = app.rootGraph
  const { inside, title, description, promoted, inputs, outputs } = job
  const { subgraph, node } = graph.convertToSubgraph(new Set(inside.map((id) => graph.getNodeById(id))))
  subgraph.name = node.title = title
  subgraph.extra = { BlueprintDescription: description }
  node.properties = { ...node.properties, cnr_id: job.stamp.cnr_id, ver: job.stamp.version, proxyWidgets: promoted }
  for (const [was, name] of Object.entries(inputs)) subgraph.renameInput(subgraph.inputs.find((input) => input.name === was), name)
  outputs.forEach((name, at) => subgraph.renameOutput(subgraph.outputs[at], name))
  const { nodes, subgraphs } = app.canvas._serializeItems([node])
  for (const slot of nodes[0].inputs) slot.link = null
  for (const slot of nodes[0].outputs) slot.links = []
  nodes[0].pos = [0, 0]
  const form = { revision: 0, version: 0.4, config: {}, extra: {}, groups: [], links: [], last_link_id: 0, last_node_id: node.id }
  return { ...form, nodes, definitions: { subgraphs } }
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

// The part of the window that no tool bar covers.
const VIEW = { x: 70, y: 96, width: 1200, height: 600 }

async function picture(page, path) {
  await page.evaluate((view) => {
    const nodes = app.rootGraph.nodes
    const left = Math.min(...nodes.map((n) => n.pos[0]))
    const top = Math.min(...nodes.map((n) => n.pos[1])) - 50
    const right = Math.max(...nodes.map((n) => n.pos[0] + n.size[0]))
    const bottom = Math.max(...nodes.map((n) => n.pos[1] + n.size[1]))
    const frame = app.canvas.canvas.getBoundingClientRect()
    const scale = Math.min((view.width - 20) / (right - left), (view.height - 20) / (bottom - top))
    const middle = [view.x - frame.x + view.width / 2, view.y - frame.y + view.height / 2]
    app.canvas.ds.scale = scale
    app.canvas.ds.offset = [middle[0] / scale - (left + right) / 2, middle[1] / scale - (top + bottom) / 2]
    app.canvas.setDirty(true, true)
  }, VIEW)
  await page.waitForTimeout(800)
  await page.screenshot({ path, type: 'jpeg', quality: 72, clip: VIEW })
}

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ['--no-sandbox'] })
const errors = []

async function open() {
  const page = await browser.newPage({ viewport: { width: 1290, height: 780 } })
  page.on('pageerror', (error) => errors.push(String(error)))
  // A resource that is not there (a user's style sheet) is not an error of a workflow.
  page.on('console', (message) => {
    if (message.type() === 'error' && !/Failed to load resource|before initialization/.test(message.text())) errors.push(message.text())
  })
  await page.goto(url)
  await page.waitForFunction(() => window.app?.extensionManager && window.app?.canvas?.graph, null, { timeout: 120000 })
  await page.evaluate(async (body) => {
    for (const [id, value] of Object.entries(body)) await app.extensionManager.setting.set(id, value)
  }, request.settings ?? {})
  return page
}

try {
  const reply = {}
  // A page's function is sent by its text alone: blueprint's brings build's with it.
  const steps = { build: String(build), blueprint: `async (job) => { ${build}\n return (${blueprint})(job) }`, check: String(check) }
  const [kind] = Object.keys(steps).filter((name) => name in request)
  let page = await open()
  for (const [index, job] of request[kind].entries()) {
    // The front-end remembers widgets by their node's id: a graph made after another would take its values where it names none.
    if (index && !request.check) {
      await page.close()
      page = await open()
    }
    errors.length = 0
    reply[job.name] = await page.evaluate(`(${steps[kind]})(${JSON.stringify(job)})`)
    if (job.picture) await picture(page, job.picture)
    if (request.check) reply[job.name].errors = [...errors]
  }
  process.stdout.write(JSON.stringify(reply))
} finally {
  await browser.close()
}
